// Expert matmuls to test, and how far results are from ggml's dequantized weights in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>

#include "quantized.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

// Memory as cudaMalloc gives it: aligned; no byte longer than asked for, so that ASan sees a read beyond it.
struct DeviceMemory {
    explicit DeviceMemory(size_t n_bytes) : data(allocate(n_bytes), std::free) {}
    static unsigned char* allocate(size_t n_bytes) {
        void* memory = nullptr;
        REQUIRE(posix_memalign(&memory, 16, n_bytes) == 0);
        return static_cast<unsigned char*>(memory);
    }
    std::unique_ptr<unsigned char, void (*)(void*)> data;
};

struct ExpertCase {
    int32_t n_experts, n_rows, n_values, n_tokens, n_used;
    bool per_token;  // x has one row for a token, else one for each of its experts
    int32_t n_slots() const { return n_tokens * n_used; }
    int32_t n_x() const { return per_token ? n_tokens : n_slots(); }
    int32_t n_chunks() const { return (n_values + 255) / 256; }
};

// Each token uses different experts, the first of them more often; the last expert is used by none.
inline std::vector<int32_t> choose_experts(const ExpertCase& c) {
    std::mt19937 generator(5);
    std::vector<int32_t> ids;
    for (int32_t token = 0; token < c.n_tokens; ++token) {
        std::vector<int32_t> experts;
        while (static_cast<int32_t>(experts.size()) < c.n_used) {
            const auto n = static_cast<uint32_t>(std::max(1, c.n_experts - 1));
            const auto expert = static_cast<int32_t>(std::min(generator() % n, generator() % n));
            if (std::find(experts.begin(), experts.end(), expert) == experts.end()) experts.push_back(expert);
        }
        ids.insert(ids.end(), experts.begin(), experts.end());
    }
    return ids;
}

// [n_x][n_values]; rows beyond float16's range, and close to nothing
inline std::vector<float> activations(const ExpertCase& c) {
    std::vector<float> x = random_values(static_cast<size_t>(c.n_x()) * c.n_values, 2);
    for (int32_t i = 0; i < c.n_values; ++i) x[i] *= 1e9f;
    for (int32_t i = c.n_values; c.n_x() > 1 && i < 2 * c.n_values; ++i) x[i] *= 1e-20f;
    return x;
}

// Largest difference of a slot's results, relative to the sum of its terms' sizes.
inline double error_of_slot(const ExpertCase& c, const QuantizedRows& weights, const float* x, int32_t expert,
                            const float* y) {
    double worst = 0.0;
    for (int32_t row = 0; row < c.n_rows; ++row) {
        const float* w = weights.dequantized.data() + (int64_t{expert} * c.n_rows + row) * c.n_values;
        double sum = 0.0, size = 0.0;
        for (int32_t i = 0; i < c.n_values; ++i) {
            sum += static_cast<double>(w[i]) * x[i];
            size += std::fabs(static_cast<double>(w[i]) * x[i]);
        }
        const double error = std::fabs(y[row] - sum) / std::max(size, 1e-300);
        if (!(error <= worst)) worst = error;  // a NaN too
    }
    return worst;
}

inline double worst_error(const ExpertCase& c, const QuantizedRows& weights, const std::vector<float>& x,
                          const std::vector<int32_t>& ids, const std::vector<float>& y) {
    double worst = 0.0;
    for (int32_t slot = 0; slot < c.n_slots(); ++slot) {
        const int32_t row = c.per_token ? slot / c.n_used : slot;
        const double error = error_of_slot(c, weights, x.data() + int64_t{row} * c.n_values, ids[slot],
                                           y.data() + int64_t{slot} * c.n_rows);
        if (!(error <= worst)) worst = error;
    }
    return worst;
}

}  // namespace testing
}  // namespace pydiffusion
