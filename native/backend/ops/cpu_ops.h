// CpuOps: operations as nodes of our own on the CPU (fused rows, attention, tile GEMM), with ggml's matmuls
// where ours don't support a type.
#pragma once

#include "backend/cpu/matmul.h"
#include "backend/ops/ops.h"

namespace pydiffusion {

class CpuOps : public Ops {
  public:
    explicit CpuOps(const OpsContext& context) : CpuOps(context, context.backend.kernel()) {}
    CpuOps(const OpsContext& context, gemm::Kernel kernel)
        : Ops(context),
          kernel_(kernel),
          matmul_(context.ctx, kernel),
          angles_(context.ctx, context.inputs, context.n_tokens) {}

    ggml_tensor* rms_norm(ggml_tensor* x, ggml_tensor* weight, ForMatmuls) override;
    ggml_tensor* add_normed(ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight) override;
    ggml_tensor* unscaled_matmul_node(ggml_tensor* weight, ggml_tensor* x) override {
        return matmul_.apply_unpadded(weight, x);
    }
    ggml_tensor* gated_gelu(ggml_tensor* gate, ggml_tensor* up, ForMatmuls) override;
    ggml_tensor* concat_tokens(const std::vector<ggml_tensor*>& parts) override;
    ggml_tensor* rotate(ggml_tensor* x, ggml_tensor* norm, const Rope& rope, int64_t first_token) override;
    ggml_tensor* attend(ggml_tensor* q, const CacheRows& visible, const Causal* causal, int32_t device,
                        ForMatmuls) override;
    ggml_tensor* rotate_axes(ggml_tensor* x, ggml_tensor* norm, const Rope& rope) override;
    ggml_tensor* attend_all(const Heads& heads, bool exact, const WeightMatrix& for_matmul) override;
    ggml_tensor* limit(ggml_tensor* x, float low, float high) override;
    Mixture moe(ggml_tensor* x, const RouterChoice& choice, const ExpertWeights& w) override;
    ggml_tensor* join(ggml_tensor* x, ggml_tensor* dense, const Mixture& mixture, const JoinWeights& w,
                      const NextInput& next) override;
    void keep_activations() override { matmul_.keep_activations(); }
    void set_positions(const std::vector<int32_t>& positions) override { angles_.write(positions); }
    void set_axial_positions(const std::vector<AxialPosition>& positions) override {
        angles_.write(positions);
    }

  protected:
    ggml_tensor* add_changes(const std::vector<LowRank>& changes, ggml_tensor* x,
                             ggml_tensor* result) override;
    ggml_tensor* add_expert_changes(const std::vector<LowRank>& changes, ggml_tensor* x, ggml_tensor* chosen,
                                    ggml_tensor* result) override;
    ggml_tensor* unscaled_matmul(ggml_tensor* weight, ggml_tensor* x) override {
        return matmul_.apply(weight, x);
    }
    ggml_tensor* expert_matmul(ggml_tensor* weights, ggml_tensor* x, ggml_tensor* chosen) override {
        return matmul_.apply(weights, x, chosen);
    }

  private:
    const gemm::Kernel kernel_;
    gemm::Matmul matmul_;
    RopeAngles angles_;
};

}  // namespace pydiffusion
