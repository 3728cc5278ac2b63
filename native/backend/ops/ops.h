// Ops: the operations that layers are made of, as nodes of a graph. Implementations: CpuOps; GgmlOps, from
// ggml's own operations, for any device; OwnKernelOps, for devices with kernels of ours.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

#include "backend/cpu/attention.h"
#include "backend/cpu/fused_rows.h"
#include "backend/cpu/low_rank.h"
#include "backend/graph_executor.h"
#include "backend/graph_inputs.h"
#include "backend/rope_angles.h"
#include "backend/weight_matrix.h"
#include "ggml.h"

namespace pydiffusion {

// The matmuls that will read a result; null weights are left out. An implementation may give the result the
// type that they want.
using ForMatmuls = std::initializer_list<WeightMatrix>;

// Projections of attention; qkv is null, or the others concatenated. Without v, K serves as V too.
struct HeadWeights {
    WeightMatrix q, k, v;
    ggml_tensor* qkv;
};

// Q, K and V, [head_dim, n_heads, n_tokens].
struct Heads {
    ggml_tensor *q, *k, *v;
};

// RMS norms of heads before RoPE: weights [head_dim] of Q and K; whether V has one (without weight and RoPE).
struct HeadNorms {
    ggml_tensor *q, *k;
    bool v;
};

// Rows of a layer's KV cache, [head_dim * n_head_kv, n_rows] each.
struct CacheRows {
    ggml_tensor *k, *v;
    int64_t first;
    int64_t n;
};

// gate_up is null, or gate and up concatenated.
struct MlpWeights {
    WeightMatrix gate, up;
    ggml_tensor* gate_up;
    WeightMatrix down;
};

// Experts [n_inner, n_rows, n_expert]; gate_up, or gate and up, is null.
struct ExpertWeights {
    ggml_tensor *gate_up, *gate, *up, *down;
    // [n_expert], of the matrices' results before the activation; null: 1
    ggml_tensor *gate_up_scales, *gate_scales, *up_scales;
    ggml_tensor* scales;  // [n_expert], of the experts' outputs
    int64_t n_used;       // per token
    bool with_layer;      // on the device of their layer
};

// Inputs of the branches after the attention: norms [d], and what reads the normed rows.
struct BranchInputs {
    ggml_tensor* dense_norm;
    const MlpWeights& dense;
    ggml_tensor *router_norm, *experts_norm;
    const ExpertWeights& experts;
};

// Scores of the experts [n_expert, n_tokens], and the best of each token, I32 [n_used, n_tokens], or null.
struct RouterChoice {
    ggml_tensor *scores, *chosen;
};

// Outputs of the chosen experts: their weighted sum, or what join() needs to compute it.
struct Mixture {
    ggml_tensor* sum;      // [d, n_tokens], or null
    ggml_tensor* experts;  // [d, n_used, n_tokens]
    ggml_tensor* scores;   // [n_expert, n_tokens]
    ggml_tensor* chosen;   // I32 [n_used, n_tokens]
};

// RMS norms of a layer's two branches and of their sum, [d]; scale [1] of the layer's output.
struct JoinWeights {
    ggml_tensor *dense_norm, *mixture_norm, *norm, *scale;
    ggml_tensor* expert_scales;  // [n_expert]
};

// Input of the next layer: a norm [d], and the matrices that read the normed rows. The norm is
// null if there is none, or on another device.
struct NextInput {
    ggml_tensor* norm;
    HeadWeights heads;
};

// Where an implementation builds; all of it must live as long as the graph.
struct OpsContext {
    ggml_context* ctx;
    ggml_cgraph* graph;
    const Backend& backend;
    GraphInputs& inputs;
    int64_t n_tokens;                       // of the graph
    const float* rms_eps;                   // of all norms
    bool single_device;                     // all weights are on one device
    const LowRankTable* changes = nullptr;  // of the matrices, by adapters; null: none
};

class Ops {
  public:
    explicit Ops(const OpsContext& context) : c_(context) {}
    virtual ~Ops() = default;
    Ops(const Ops&) = delete;
    Ops& operator=(const Ops&) = delete;

    // x / sqrt(mean of squares of its row + eps), times weight [ne0] unless that is null.
    virtual ggml_tensor* rms_norm(ggml_tensor* x, ggml_tensor* weight = nullptr,
                                  ForMatmuls for_matmuls = {}) = 0;
    // x + rms_norm(branch, weight)
    virtual ggml_tensor* add_normed(ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight);
    // add_normed(x, branch, weight). An implementation may compute the branches' inputs at once; the
    // functions below find them by the result.
    virtual ggml_tensor* end_attention(ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight,
                                       const BranchInputs&) {
        return add_normed(x, branch, weight);
    }
    // weight [n_inner, n_rows], with its changes, times x [n_inner, n_tokens] -> F32 [n_rows, n_tokens]
    ggml_tensor* matmul(const WeightMatrix& weight, ggml_tensor* x);
    // The same without the weight's scale, as a node instead of a view, so that a buffer can be assigned to
    // it.
    virtual ggml_tensor* unscaled_matmul_node(ggml_tensor* weight, ggml_tensor* x) {
        return unscaled_matmul(weight, x);
    }
    // gelu(gate) * up, silu(gate) * up
    virtual ggml_tensor* gated_gelu(ggml_tensor* gate, ggml_tensor* up, ForMatmuls for_matmuls = {}) = 0;
    ggml_tensor* gated_silu(ggml_tensor* gate, ggml_tensor* up) {
        return ggml_swiglu_split(c_.ctx, gate, up);
    }
    // [d, n_i] -> [d, sum of n_i]
    virtual ggml_tensor* concat_tokens(const std::vector<ggml_tensor*>& parts) = 0;

    // h [d, n_tokens], normed.
    virtual Heads project(ggml_tensor* h, const HeadWeights& w, int64_t head_dim);
    // Norm and RoPE of heads; x holds the graph's tokens from `first_token` on.
    virtual ggml_tensor* rotate(ggml_tensor* x, ggml_tensor* norm, const Rope& rope, int64_t first_token) = 0;
    // Writes K, rotated, and V to these rows of the cache, as many as they have tokens.
    virtual void store(const Heads& heads, const HeadNorms& norms, const Rope& rope, int64_t first_token,
                       const CacheRows& rows);
    // store(), and Q rotated: F32, or what attend() wants.
    virtual ggml_tensor* rotate_and_store(const Heads& heads, const HeadNorms& norms, const Rope& rope,
                                          int64_t first_token, const CacheRows& rows);
    // softmax(q . k) v over rows of the cache: q [head_dim, n_head, n_tokens] -> [head_dim * n_head,
    // n_tokens]. causal: null if every token sees every row. device: of the layer.
    virtual ggml_tensor* attend(ggml_tensor* q, const CacheRows& visible, const Causal* causal,
                                int32_t device, ForMatmuls for_matmuls = {}) = 0;

    // RMS norm, then RoPE of the two halves of each head by the two positions of set_axial_positions(): x
    // [head_dim, n_heads, n_tokens], head_dim a multiple of 4. factors of the Rope: none.
    virtual ggml_tensor* rotate_axes(ggml_tensor* x, ggml_tensor* norm, const Rope& rope) = 0;
    // softmax(q . k) v over all tokens of the graph, each [head_dim, n_head, n_tokens] -> [head_dim * n_head,
    // n_tokens]. exact: K and V stay F32; else they may be rounded, as the result is for the matmul.
    virtual ggml_tensor* attend_all(const Heads& heads, bool exact, const WeightMatrix& for_matmul) = 0;
    // min(max(x, low), high)
    virtual ggml_tensor* limit(ggml_tensor* x, float low, float high) = 0;

    // MLP with gated GELU of rms_norm(x, norm). beside: the experts that follow on the same x, if any, which
    // a device may compute at the same time.
    virtual ggml_tensor* mlp(ggml_tensor* x, ggml_tensor* norm, const MlpWeights& w,
                             const ExpertWeights* beside = nullptr);
    // Scores of the experts: weight [d, n_expert] times rms_norm(x, norm).
    virtual RouterChoice route(ggml_tensor* x, ggml_tensor* norm, ggml_tensor* weight, const ExpertWeights&) {
        return {matmul({weight}, rms_norm(x, norm)), nullptr};
    }
    // Mixture of the n_used experts of the highest score, weighted by the softmax of their scores / sqrt(d):
    // x F32 [d, n_tokens].
    virtual Mixture moe(ggml_tensor* x, const RouterChoice& choice, const ExpertWeights& w) = 0;
    // (x + rms_norm(rms_norm(dense, dense_norm) + rms_norm(mixture, mixture_norm), norm)) * scale. An
    // implementation may compute the next layer's input at once; rms_norm() finds it by the result.
    virtual ggml_tensor* join(ggml_tensor* x, ggml_tensor* dense, const Mixture& mixture,
                              const JoinWeights& w, const NextInput& next);

    // From now on activations stay nodes of the graph, so that they can be read (imatrix collection).
    virtual void keep_activations() {}

    // After the graph is allocated: fills the masks.
    virtual void fill_masks() {}
    // Writes the inputs that depend on the tokens' positions.
    virtual void set_positions(const std::vector<int32_t>& positions) = 0;
    // The same of rotate_axes(): (first, second) of each token.
    virtual void set_axial_positions(const std::vector<AxialPosition>& positions) = 0;

    // Nodes that are computed on the device of a weight, whatever the scheduler would choose.
    const GraphExecutor::Pinned& pinned() const { return pinned_; }

  protected:
    virtual ggml_tensor* unscaled_matmul(ggml_tensor* weight, ggml_tensor* x) = 0;
    // x [head_dim * n_heads, n_tokens] -> [head_dim, n_heads, n_tokens]
    ggml_tensor* split_heads(ggml_tensor* x, int64_t head_dim) const {
        return ggml_reshape_3d(c_.ctx, x, head_dim, x->ne[0] / head_dim, x->ne[1]);
    }
    // View of n rows of a cache from `first` on as heads -> [head_dim, n, n_head_kv]
    ggml_tensor* rows_of_heads(ggml_tensor* cache, int64_t head_dim, int64_t first, int64_t n) const {
        return ggml_view_3d(c_.ctx, cache, head_dim, n, cache->ne[0] / head_dim, cache->nb[1],
                            ggml_row_size(cache->type, head_dim), first * cache->nb[1]);
    }
    // View [head_dim, n_heads, n_tokens] -> [head_dim, n_tokens, n_heads]
    ggml_tensor* tokens_of_heads(ggml_tensor* x) const { return ggml_permute(c_.ctx, x, 0, 2, 1, 3); }
    // A [d, n_tokens] as [d, 1, n_tokens]: one row for all experts of a token.
    ggml_tensor* one_row_per_token(ggml_tensor* x) const {
        return ggml_reshape_3d(c_.ctx, x, x->ne[0], 1, x->ne[1]);
    }
    // weights [n_inner, n_rows, n_expert], x [n_inner, 1 or n_used, n_tokens], chosen I32 [n_used, n_tokens]
    // -> F32 [n_rows, n_used, n_tokens]
    virtual ggml_tensor* expert_matmul(ggml_tensor* weights, ggml_tensor* x, ggml_tensor* chosen) = 0;
    // Whether any of these matrices has changes; null stands for no matrix.
    bool is_changed(std::initializer_list<const ggml_tensor*> weights) const;
    // result = weight x, [n_rows, n_tokens] -> the same with the weight's changes.
    ggml_tensor* with_changes(const ggml_tensor* weight, ggml_tensor* x, ggml_tensor* result);
    virtual ggml_tensor* add_changes(const std::vector<LowRank>& changes, ggml_tensor* x,
                                     ggml_tensor* result);
    // The same of chosen experts: operands as of expert_matmul().
    ggml_tensor* with_expert_changes(const ggml_tensor* weights, ggml_tensor* x, ggml_tensor* chosen,
                                     ggml_tensor* result);
    virtual ggml_tensor* add_expert_changes(const std::vector<LowRank>& changes, ggml_tensor* x,
                                            ggml_tensor* chosen, ggml_tensor* result);
    // scales [n_expert] of the chosen experts -> [1, n_used, n_tokens]
    ggml_tensor* scales_of(ggml_tensor* scales, ggml_tensor* chosen) const;
    // expert_matmul(), times the experts' scales unless they are null, with the weights' changes.
    ggml_tensor* changed_expert_matmul(ggml_tensor* weights, ggml_tensor* scales, ggml_tensor* x,
                                       ggml_tensor* chosen);
    // Outputs of the chosen experts: x [d, n_tokens] -> [d, n_used, n_tokens]
    ggml_tensor* experts(ggml_tensor* x, ggml_tensor* chosen, const ExpertWeights& w);

    // join() as a single node; next_norm: null, or the norm of the next layer's input, of that type.
    Joined join_in_one_node(ggml_tensor* x, ggml_tensor* dense, const Mixture& mixture, const JoinWeights& w,
                            ggml_tensor* next_norm = nullptr, ggml_type next_type = GGML_TYPE_F32);

    const OpsContext c_;
    GraphExecutor::Pinned pinned_;
};

// The implementation for the context's backend.
std::unique_ptr<Ops> make_ops(const OpsContext& context);

}  // namespace pydiffusion
