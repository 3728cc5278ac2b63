// Graph nodes of our own, for what ggml's CPU backend has not, or only through 16-bit tables.
#pragma once

#include <cstdint>
#include <vector>

#include "ggml.h"
#include "matrix/kernels.h"
#include "sampler.h"

namespace pydiffusion {

// The indices of the k largest entries of each row of values [n, n_rows], best first -> I32 [k, n_rows]. Of
// equal entries the first comes first; NaN counts as least. (ggml sorts with a comparison that NaN breaks,
// and then reads and writes beyond the row.)
ggml_tensor* best_rows(ggml_context* ctx, ggml_tensor* values, int64_t k);

// What one denoising step takes in and gives out beside the logits; owned by the denoiser, so that a graph
// built once serves all steps.
struct StepState {
    bool self_conditioning = false;     // else the soft embedding is 0
    float previous_temperature = 1.0f;  // of the logits that condition this step
    float temperature = 1.0f;
    float soft_cap = 30.0f;
    float embedding_scale = 1.0f;         // sqrt(d)
    std::vector<float> u;                 // [n_tokens] uniforms for the draws
    std::vector<Measure> measures;        // [n_tokens], written by the step
    std::vector<Normalizer> normalizers;  // [n_tokens], likewise, of logits that nobody changed since
    matrix::Kernel kernel = matrix::Kernel::ggml;  // of self-conditioning's dense product
    float dropped_mass = 0.0f;   // of a token's probabilities, what self-conditioning may leave out
    std::vector<uint64_t> mass;  // [n_tokens, n_tiles] masks of rows with mass, see soft_embedding
};

// In place: caps the logits [n_vocab, n_tokens] and measures each position into state->measures.
ggml_tensor* cap_and_measure(ggml_context* ctx, ggml_tensor* logits, StepState* state);

}  // namespace pydiffusion
