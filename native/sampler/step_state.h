// StepState: inputs and outputs of a denoising step, except the logits.
#pragma once

#include <cstdint>
#include <vector>

#include "ggml.h"
#include "sampler/logits.h"
#include "util/cpu_kernels.h"

namespace pydiffusion {

// Owned by the denoiser: the graph keeps a pointer to it and is reused for all steps.
struct StepState {
    bool self_conditioning = false;     // if false, the soft embedding is 0
    float previous_temperature = 1.0f;  // of the logits that condition this step
    float temperature = 1.0f;
    float soft_cap = 30.0f;
    float embedding_scale = 1.0f;         // sqrt(d)
    std::vector<float> u;                 // [n_tokens] uniforms for the draws
    std::vector<Measure> measures;        // [n_tokens], written by the step
    std::vector<Normalizer> normalizers;  // [n_tokens], likewise; valid until the logits change
    // A device's sums over the logits, which measure() leaves for the next step's condition(): F32
    // [n_sums(n_vocab), n_tokens], of the first n_summed positions at a temperature; 0: the logits have
    // changed.
    ggml_tensor* sums = nullptr;
    int64_t n_summed = 0;
    float summed_temperature = 0.0f;
    gemm::Kernel kernel = gemm::Kernel::ggml;  // of self-conditioning's dense GEMM
    float dropped_mass = 0.0f;                 // mass per position that self-conditioning may drop
    std::vector<uint64_t> mass;  // [n_tokens, n_tiles] masks of nonzero probabilities, see soft_embedding
};

}  // namespace pydiffusion
