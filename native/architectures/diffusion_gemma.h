// DiffusionGemma. Encoder and denoiser share its layers, and differ in embedding, mask and layer scale only.
#pragma once

#include "model/architecture.h"

namespace pydiffusion {

class DiffusionGemma : public Architecture {
  public:
    const char* name() const override { return "diffusion-gemma"; }
    const char* sampler() const override { return "entropy-bound"; }

    // diffusion_gemma_file.cpp
    void read_hparams(const KeyReader& keys, Hparams& hparams) const override;
    void load_weights(WeightsLoader& load, const Hparams& hparams, Weights& weights) const override;

    // diffusion_gemma.cpp
    ggml_tensor* embed_prompt(GraphBuilder& g, ggml_tensor* tokens) const override;
    ggml_tensor* embed_canvas(GraphBuilder& g, ggml_tensor* tokens, ggml_tensor* soft) const override;
    ggml_tensor* layer(GraphBuilder& g, int32_t i_layer, ggml_tensor* x) const override;
    void store_keys_and_values(GraphBuilder& g, int32_t i_layer, ggml_tensor* x) const override;
};

}  // namespace pydiffusion
