#include "sampler/entropy_bound.h"

#include <algorithm>
#include <numeric>

namespace pydiffusion {

float step_temperature(int32_t step, int32_t n_steps, float t_min, float t_max) {
    return t_min + (t_max - t_min) * (static_cast<float>(step) / static_cast<float>(n_steps));
}

std::vector<uint8_t> accept(const float* entropy, size_t n, float bound) {
    std::vector<size_t> order(n);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [entropy](size_t a, size_t b) { return entropy[a] < entropy[b]; });
    std::vector<uint8_t> accepted(n, 0);
    double running = 0.0;
    for (const size_t i : order) {
        if (!(running <= bound)) break;
        accepted[i] = 1;
        running += entropy[i];
    }
    return accepted;
}

}  // namespace pydiffusion
