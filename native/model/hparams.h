// Hyperparameters from GGUF metadata: typed, range-checked, read once.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gguf/gguf_file.h"

namespace pydiffusion {

struct LayerShape {
    bool sliding;      // sliding-window attention; otherwise full attention without a V projection
    int32_t head_dim;  // of queries, keys and values
    int32_t n_head_kv;
};

// Sampler defaults: from the file if present, otherwise those of the reference implementation.
struct SamplerDefaults {
    int32_t steps = 48;
    float t_min = 0.4f;
    float t_max = 0.8f;
    float entropy_bound = 0.1f;
    int32_t stability_threshold = 1;
    float confidence_threshold = 0.005f;
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
    SamplerDefaults sampler;
    std::string sampler_name = "entropy-bound";
    int32_t mask_token = -1;

    // Throws Error(unsupported) for another architecture or feature, Error(format) for invalid values.
    explicit Hparams(const GgufFile& file);
};

}  // namespace pydiffusion
