// A toy architecture, which proves that another model is a matter of these files and of lines in registries:
// a small transformer for masked diffusion, without experts, with sandwich norms.
#pragma once

#include "model/architecture.h"

namespace pydiffusion {
namespace testing {

class MaskedToy : public Architecture {
  public:
    const char* name() const override { return "masked-toy"; }
    const char* sampler() const override { return "unmask"; }
    void read_hparams(const KeyReader& keys, Hparams& hparams) const override;
    void load_weights(WeightsLoader& load, const Hparams& hparams, Weights& weights) const override;
    ggml_tensor* embed_prompt(GraphBuilder& g, ggml_tensor* tokens) const override;
    ggml_tensor* embed_canvas(GraphBuilder& g, ggml_tensor* tokens, ggml_tensor* soft) const override;
    ggml_tensor* layer(GraphBuilder& g, int32_t i_layer, ggml_tensor* x) const override;
    void store_keys_and_values(GraphBuilder& g, int32_t i_layer, ggml_tensor* x) const override;
};

}  // namespace testing
}  // namespace pydiffusion
