// Wall-clock time of work.
#pragma once

#include <algorithm>
#include <chrono>

namespace pydiffusion {

template <typename Work>
double seconds_of(const Work& work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

template <typename Work>
double best_seconds(const Work& work, int n_repeats = 3) {
    double best = seconds_of(work);
    for (int i = 1; i < n_repeats; ++i) best = std::min(best, seconds_of(work));
    return best;
}

}  // namespace pydiffusion
