// Inputs and outputs of a denoising step beside the logits.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/cpu/amx/tile_gemm.h"
#include "sampler/logits.h"

namespace pydiffusion {

// What one denoising step takes in and gives out beside the logits; owned by the denoiser, so that a graph
// built once serves all steps.
struct StepState {
    bool self_conditioning = false;     // else the soft embedding is 0
    float previous_temperature = 1.0f;  // of the logits that condition this step
    float temperature = 1.0f;
    float soft_cap = 30.0f;
    float embedding_scale = 1.0f;              // sqrt(d)
    std::vector<float> u;                      // [n_tokens] uniforms for the draws
    std::vector<Measure> measures;             // [n_tokens], written by the step
    std::vector<Normalizer> normalizers;       // [n_tokens], likewise, of logits that nobody changed since
    gemm::Kernel kernel = gemm::Kernel::ggml;  // of self-conditioning's dense product
    float dropped_mass = 0.0f;   // of a token's probabilities, what self-conditioning may leave out
    std::vector<uint64_t> mass;  // [n_tokens, n_tiles] masks of rows with mass, see soft_embedding
};

}  // namespace pydiffusion
