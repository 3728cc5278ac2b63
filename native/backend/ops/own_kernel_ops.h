// OwnKernelOps: GgmlOps with the nodes for which devices have kernels of ours (own_kernels.h): fused rows,
// attention, expert matmuls, an MLP beside them. Where a device lacks one, or the host stands in for it, the
// CPU computes the node.
#pragma once

#include <map>
#include <utility>

#include "backend/expert_nodes.h"
#include "backend/ops/ggml_ops.h"

namespace pydiffusion {

class OwnKernelOps : public GgmlOps {
  public:
    explicit OwnKernelOps(const OpsContext& context)
        : GgmlOps(context),
          expert_matmuls_(context.ctx, context.backend),
          angles_(context.ctx, context.inputs, context.n_tokens) {}

    // A result that only BF16 matmuls read is BF16: they would round it first, each on its own.
    ggml_tensor* rms_norm(ggml_tensor* x, ggml_tensor* weight, ForMatmuls for_matmuls) override;
    ggml_tensor* gated_gelu(ggml_tensor* gate, ggml_tensor* up, ForMatmuls for_matmuls) override;
    ggml_tensor* add_normed(ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight) override;
    ggml_tensor* end_attention(ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight,
                               const BranchInputs& inputs) override;
    Heads project(ggml_tensor* h, const HeadWeights& w, int64_t head_dim) override;
    ggml_tensor* rotate(ggml_tensor* x, ggml_tensor* norm, const Rope& rope, int64_t first_token) override;
    void store(const Heads& heads, const HeadNorms& norms, const Rope& rope, int64_t first_token,
               const CacheRows& rows) override;
    ggml_tensor* rotate_and_store(const Heads& heads, const HeadNorms& norms, const Rope& rope,
                                  int64_t first_token, const CacheRows& rows) override;
    ggml_tensor* attend(ggml_tensor* q, const CacheRows& visible, const Causal* causal, int32_t device,
                        ForMatmuls for_matmuls) override;
    ggml_tensor* mlp(ggml_tensor* x, ggml_tensor* norm, const MlpWeights& w,
                     const ExpertWeights* beside) override;
    RouterChoice route(ggml_tensor* x, ggml_tensor* norm, ggml_tensor* weight,
                       const ExpertWeights& w) override;
    Mixture moe(ggml_tensor* x, const RouterChoice& choice, const ExpertWeights& w) override;
    ggml_tensor* join(ggml_tensor* x, ggml_tensor* dense, const Mixture& mixture, const JoinWeights& w,
                      const NextInput& next) override;
    void set_positions(const std::vector<int32_t>& positions) override;

  protected:
    ggml_tensor* expert_matmul(ggml_tensor* weights, ggml_tensor* x, ggml_tensor* chosen) override;

  private:
    // View of n rows of a cache from `first` on -> [head_dim, n_head_kv, n]
    ggml_tensor* target_heads(ggml_tensor* cache, int64_t head_dim, int64_t first, int64_t n) const;
    ggml_tensor* angles(const Rope& rope, const ggml_tensor* x, int64_t first_token) {
        return angles_.view(rope, x->ne[0], first_token, x->ne[2]);
    }

    // Whether the experts' input can be packed at the attention's end, in one order for all matrices.
    bool packs_input(const ExpertWeights& w, int64_t n_tokens) const;

    ExpertMatmuls expert_matmuls_;
    // rms_norm(x, weight) that another node computes: x and weight -> part of its result
    std::map<std::pair<const ggml_tensor*, const ggml_tensor*>, ggml_tensor*> normed_;
    RopeAngles angles_;
};

}  // namespace pydiffusion
