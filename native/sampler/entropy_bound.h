// Entropy-bound sampler: which positions of a canvas a step accepts, and the temperature schedule.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pydiffusion {

// Temperature of step n of N, n counted down from N to 1: t_min + (t_max - t_min) * n / N.
float step_temperature(int32_t step, int32_t n_steps, float t_min, float t_max);

// The entropy-bound rule of arXiv 2505.24857: in ascending order of entropy, accepts a position while the sum
// of the entropies before it is at most `bound`. Ties are in order of position.
std::vector<uint8_t> accept(const float* entropy, size_t n, float bound);

}  // namespace pydiffusion
