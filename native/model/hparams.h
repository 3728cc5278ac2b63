// Hyperparameters from GGUF metadata: typed, range-checked, read once.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gguf/gguf_file.h"
#include "sampler/sampler_options.h"

namespace pydiffusion {

class Architecture;

struct LayerShape {
    bool sliding;      // sliding-window attention; otherwise full attention
    int32_t head_dim;  // of queries, keys and values
    int32_t n_head_kv;
};

// Ids of the tokens in whose places images are: one per soft token, between begin and end.
struct ImageTokens {
    int32_t image = -1, begin = -1, end = -1;

    bool any() const { return image >= 0; }
};

// Of any architecture; what a model does not have is 0.
struct Hparams {
    const Architecture* architecture;
    int32_t n_layer = 0;
    int32_t n_ctx_train = 0;
    int32_t n_embd = 0;
    int32_t n_vocab = 0;
    int32_t n_ff = 0;  // dense MLP; also that of self-conditioning
    int32_t n_ff_expert = 0;
    int32_t n_expert = 0;
    int32_t n_expert_used = 0;
    int32_t n_head = 0;
    int32_t window = 0;  // keys visible in sliding layers, including the token itself
    int32_t canvas_length = 0;
    float rms_eps = 0.0f;
    float soft_cap = 0.0f;         // of the final logits
    float embedding_scale = 1.0f;  // see Model::embedding_scale
    // Of full layers, whose frequencies are divided by rope_freqs.weight if there is one.
    float rope_base = 0.0f;
    float rope_base_swa = 0.0f;  // sliding layers
    std::vector<LayerShape> layers;
    ImageTokens image_tokens;          // none: the model reads no images
    bool bidirectional_images = true;  // tokens of one image see each other both ways
    int32_t mask_token = -1;           // with which a canvas begins, for samplers that unmask
    SamplerValues sampler;             // defaults: the file's, otherwise the reference implementation's

    // Throws Error(unsupported) for an unknown architecture or feature, Error(format) for invalid values.
    explicit Hparams(const GgufFile& file);
};

}  // namespace pydiffusion
