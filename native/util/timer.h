// Wall-clock timers.
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

// Adds the seconds between its construction and destruction to a sum.
class AddSeconds {
  public:
    explicit AddSeconds(double& seconds) : seconds_(seconds), start_(std::chrono::steady_clock::now()) {}
    ~AddSeconds() {
        seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    }

  private:
    double& seconds_;
    std::chrono::steady_clock::time_point start_;
};

}  // namespace pydiffusion
