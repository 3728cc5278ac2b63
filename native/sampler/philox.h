// Philox random numbers of the sampler.
#pragma once

#include <cstdint>

namespace pydiffusion {

// Random numbers of one canvas position at one step.
struct Draw {
    float u;        // uniform in [0, 1), a multiple of 2^-24
    int32_t token;  // uniform over the vocabulary
};

// Philox4x32-10 (Salmon et al. 2011) with key = seed and counter = (position, step, canvas, 0): any device
// gets the same numbers in any order. Step 0 draws the initial canvas.
Draw random_draw(uint64_t seed, uint32_t canvas, uint32_t step, uint32_t position, int32_t n_vocab);

}  // namespace pydiffusion
