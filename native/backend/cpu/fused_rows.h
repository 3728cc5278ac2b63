// Fused row-wise ops of a layer between two matmuls, as custom graph nodes: each reads and writes a token's
// rows in one pass. Computed by functions on the CPU, and by cuda/ on GPUs.
//
// Every such node gives a thread the same range of tokens, so that a row is still in the cache of the core
// that wrote it when the next node reads it.
#pragma once

#include <cstdint>
#include <vector>

#include "ggml.h"

namespace pydiffusion {

// gelu_tanh(gate) * up, elementwise; same shape, contiguous rows; F32, or rounded to BF16. Accurate to float
// rounding; ggml's CPU GELU looks values up in a float16 table.
ggml_tensor* gated_gelu(ggml_context* ctx, ggml_tensor* gate, ggml_tensor* up,
                        ggml_type type = GGML_TYPE_F32);

// x / sqrt(mean of squares of its row + *eps), times weight [ne0] unless that is null; F32, or rounded to
// BF16. Contiguous rows; *eps must live as long as the graph, here and below. ggml's op sums the squares in a
// scalar loop.
ggml_tensor* rms_norm(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weight, const float* eps,
                      ggml_type type = GGML_TYPE_F32);

// x + rms_norm(branch, weight), all [d, n_tokens]
ggml_tensor* add_normed(ggml_context* ctx, ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight,
                        const float* eps);

// add_normed, and norms of its result r for what reads it, in one node. Dense rows of up to kMaxAttentionEnd
// elements, a multiple of 4: devices keep them in registers.
constexpr int64_t kMaxAttentionEnd = 3072;
struct BranchNorms {
    ggml_tensor* dense;  // [d], of the dense branch, F32 or BF16
    ggml_type dense_type;
    ggml_tensor* router;   // [d]
    ggml_tensor* experts;  // [d]; null: not packed
    int64_t packed_bytes;  // of the experts' packed rows (expert_nodes.h), which only devices compute
    bool for_repacked;
};
struct AttentionEnd {
    ggml_tensor *r, *dense, *router;  // [d, n_tokens]
    ggml_tensor* packed;              // I8 [packed_bytes], or null
};
AttentionEnd end_attention(ggml_context* ctx, ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight,
                           const BranchNorms& norms, const float* eps);
// Of such a node: type of `dense`, order of `packed`, and where they begin, in bytes from its data.
struct AttentionEndParts {
    ggml_type dense_type;
    bool for_repacked;
    int64_t dense, router, packed;
};
AttentionEndParts parts_of_attention_end(const ggml_tensor* node);

// End of a layer: joins the dense and the MoE branch with the residual, [d, n_tokens]:
// (x + rms_norm(rms_norm(dense, dense_norm) + rms_norm(mixture, mixture_norm), norm)) * scale, where
// mixture[:, t] is the sum over i of w[i] * expert_scales[chosen[i, t]] * experts[:, i, t], and w the softmax
// of the chosen experts' scores / sqrt(d). If next_norm is set, also rms_norm(result, next_norm), the input
// of the layer after it, F32 or BF16.
struct Branches {
    ggml_tensor *dense, *dense_norm;           // [d, n_tokens], [d]
    ggml_tensor* experts;                      // [d, n_used, n_tokens], outputs of the chosen experts
    ggml_tensor *scores, *chosen;              // [n_expert, n_tokens], I32 [n_used, n_tokens] best first
    ggml_tensor* expert_scales;                // [n_expert]
    ggml_tensor *mixture_norm, *norm, *scale;  // [d], [d], [1]
    ggml_tensor* next_norm;                    // [d], or null
    ggml_type next_type;
};
struct Joined {
    ggml_tensor *result, *next;  // [d, n_tokens]
};
Joined join_branches(ggml_context* ctx, ggml_tensor* x, const Branches& branches, const float* eps);

// rms_norm(x, weight), then RoPE: rotates elements i and i + head_dim / 2 of a head by an angle whose cosine
// is angles[i, t] and whose sine is angles[i + head_dim / 2, t]. x [head_dim, n_heads, n_tokens], contiguous;
// angles [head_dim, n_tokens].
ggml_tensor* rotate_normed(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weight, ggml_tensor* angles,
                           const float* eps);

// rms_norm(x, weight), then RoPE by two positions of a token: the first half of a head is rotated as a head
// of that size would be, by the first half of angles[:, t], and the second half by the second half. head_dim
// is a multiple of 4. CPU only, as is limit().
ggml_tensor* rotate_axes(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weight, ggml_tensor* angles,
                         const float* eps);

// min(max(x, low), high); NaN stays NaN.
ggml_tensor* limit(ggml_context* ctx, ggml_tensor* x, float low, float high);

// Writes rms_norm(x) of heads, or rotate_normed(x, weight, angles) if these are not null, to `target`, a view
// [head_dim, n_heads, n_tokens] of rows of a cache, which is not quantized. The result is that view.
ggml_tensor* store_normed(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weight, ggml_tensor* angles,
                          const float* eps, ggml_tensor* target);

// rotate_normed(q) and, as store_normed() does, K and V of the same tokens to a cache, in one node. The
// result is Q, F32 or rounded to F16, and what reads the cache must depend on it.
struct StoredHeads {
    ggml_tensor *k, *k_weight, *v;     // [head_dim, n_heads, n_tokens], [head_dim]; V may be K
    ggml_tensor *k_target, *v_target;  // views of the cache
};
ggml_tensor* rotate_and_store(ggml_context* ctx, ggml_tensor* q, ggml_tensor* q_weight, ggml_tensor* angles,
                              const StoredHeads& stored, const float* eps, ggml_type type = GGML_TYPE_F32);

// Which of these ops a node is.
enum class FusedOp {
    none,
    gated_gelu,
    rms_norm,
    add_normed,
    end_attention,
    join_branches,
    rotate_normed,
    store_normed,
    rotate_and_store
};
FusedOp fused_op_of(const ggml_tensor* node);
float eps_of(const ggml_tensor* node);  // of norms
// Of join_branches, whose other operands are sources.
const ggml_tensor* layer_scale_of(const ggml_tensor* node);
struct NextNorm {
    const ggml_tensor* weight;  // null: none
    ggml_type type;             // of the result
    int64_t begin;              // in bytes from the node's data
};
NextNorm next_norm_of(const ggml_tensor* node);

// Concatenates the tokens of several sequences: parts [d, n_i] -> [d, sum of n_i].
ggml_tensor* stack_tokens(ggml_context* ctx, std::vector<ggml_tensor*> parts);

// Computes row (i1, i2) of a node from the data of its sources: lets a consumer that reads each row once fuse
// the node. row_function_of is null if the node does not support it.
using ComputeRow = void (*)(const ggml_tensor* node, int64_t i1, int64_t i2, float* row);
ComputeRow row_function_of(const ggml_tensor* node);
// Appends the sources of a consumer of x's rows: x's own sources if its rows can be computed, else x.
void append_sources(std::vector<ggml_tensor*>& sources, ggml_tensor* x);

}  // namespace pydiffusion
