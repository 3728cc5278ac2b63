// Attention as one node that devices compute by a kernel of ours (cuda/attention.cu), without a mask: what a
// token sees follows from its position.
#pragma once

#include "backend/cpu/attention.h"
#include "ggml.h"

namespace pydiffusion {

// Whether the kernels can compute it: q [head_dim, n_head, n_tokens] as float32 or float16, k and v
// [head_dim, n_rows, n_head_kv] as float16, not in the host's memory (of layers on the CPU). On the GPU it
// needs Backend::attends() too.
bool can_attend_by_kernel(const ggml_tensor* q, const ggml_tensor* k, const ggml_tensor* v);

// As attend() of attention.h, on a device, but without images; the result has this type, F32 or BF16. Rows
// after k's and v's are not read.
ggml_tensor* attend_by_kernel(ggml_context* ctx, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                              const Causal* causal, ggml_type type);
bool is_attend_by_kernel(const ggml_tensor* node);

// Of a node: the row of token 0 and the window of causal attention; window 0 if every token sees every row.
struct AttentionRange {
    int32_t own_row, window;
};
AttentionRange attention_range_of(const ggml_tensor* node);

// Rows of q (a token and a query head of a KV head) that a block computes.
inline int64_t attention_tile_rows(int64_t head_dim) { return head_dim == 512 ? 64 : 128; }

// Into how many parts the keys are split, each for a block of its own, so that the blocks fill a GPU. It
// depends on sizes alone, as sums depend on it.
struct AttentionParts {
    int64_t n_tiles;   // of rows, per KV head
    int64_t n_splits;  // of keys
    // Where splits' results are, in bytes from the node's data: after its result.
    int64_t partial, sums, end;
};
AttentionParts attention_parts(const ggml_tensor* q, const ggml_tensor* k, ggml_type type);

}  // namespace pydiffusion
