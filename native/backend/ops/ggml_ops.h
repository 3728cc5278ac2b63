// GgmlOps: operations as nodes of ggml's own, which any device computes, in the order that ggml's CUDA
// backend fuses.
#pragma once

#include "backend/ops/ggml_attention.h"
#include "backend/ops/ops.h"

namespace pydiffusion {

class GgmlOps : public Ops {
  public:
    explicit GgmlOps(const OpsContext& context) : Ops(context), positions_(context.backend.n_devices() + 1) {}

    ggml_tensor* rms_norm(ggml_tensor* x, ggml_tensor* weight, ForMatmuls) override;
    ggml_tensor* gated_gelu(ggml_tensor* gate, ggml_tensor* up, ForMatmuls) override;
    ggml_tensor* concat_tokens(const std::vector<ggml_tensor*>& parts) override;
    ggml_tensor* rotate(ggml_tensor* x, ggml_tensor* norm, const Rope& rope, int64_t first_token) override;
    ggml_tensor* attend(ggml_tensor* q, const CacheRows& visible, const Causal* causal, int32_t device,
                        ForMatmuls) override;
    ggml_tensor* rotate_axes(ggml_tensor* x, ggml_tensor* norm, const Rope& rope) override;
    ggml_tensor* attend_all(const Heads& heads, bool exact, const WeightMatrix& for_matmul) override;
    ggml_tensor* limit(ggml_tensor* x, float low, float high) override;
    Mixture moe(ggml_tensor* x, const RouterChoice& choice, const ExpertWeights& w) override;
    void fill_masks() override;
    void set_positions(const std::vector<int32_t>& positions) override;
    void set_axial_positions(const std::vector<AxialPosition>& positions) override;

  protected:
    ggml_tensor* unscaled_matmul(ggml_tensor* weight, ggml_tensor* x) override;
    ggml_tensor* expert_matmul(ggml_tensor* weights, ggml_tensor* x, ggml_tensor* chosen) override;

  private:
    struct SharedMask {
        int32_t device;
        ggml_ops::Mask mask;
    };
    // Mask of n_tokens that see rows as in attend(), shared by a device's layers of the same kind.
    ggml_ops::Mask mask(int64_t n_tokens, int64_t n_visible, const Causal* causal, int32_t device);
    void pin(ggml_tensor* node, const ggml_tensor* weight) {
        if (!c_.single_device) pinned_.emplace_back(node, weight);
    }

    std::vector<ggml_tensor*> positions_;  // I32 [n_tokens] for the CPU, then each device; null until needed
    std::vector<SharedMask> masks_;
    AxialInputs axes_;  // of rotate_axes(), on its device
};

}  // namespace pydiffusion
