// Hyperparameters from GGUF metadata: typed, range-checked, read once.
#pragma once

#include <cstdint>
#include <vector>

#include "gguf/gguf_file.h"
#include "sampler/sampler_options.h"

namespace pydiffusion {

struct LayerShape {
    bool sliding;      // sliding-window attention; otherwise full attention without a V projection
    int32_t head_dim;  // of queries, keys and values
    int32_t n_head_kv;
};

struct Hparams {
    int32_t n_layer;
    int32_t n_ctx_train;
    int32_t n_embd;
    int32_t n_vocab;
    int32_t n_ff;  // dense MLP; also that of self-conditioning
    int32_t n_ff_expert;
    int32_t n_expert;
    int32_t n_expert_used;
    int32_t n_head;
    int32_t window;  // keys visible in sliding layers, including the token itself
    int32_t canvas_length;
    float rms_eps;
    float soft_cap;       // of the final logits
    float rope_base;      // full layers, whose frequencies are divided by rope_freqs.weight
    float rope_base_swa;  // sliding layers
    std::vector<LayerShape> layers;
    SamplerValues sampler;  // defaults: the file's, otherwise the reference implementation's

    // Throws Error(unsupported) for another architecture or feature, Error(format) for invalid values.
    explicit Hparams(const GgufFile& file);
};

}  // namespace pydiffusion
