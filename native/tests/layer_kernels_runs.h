// Shared by the tests of a layer's kernels: rows in memory, launches by the emulation, and how close results
// must be.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "backend/cuda/expert_rows.cuh"
#include "cuda_emulation/emulate.h"
#include "ggml.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

using namespace cuda;
using emulation::emulate;
using emulation::kOrders;
using emulation::Order;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kEps = 1e-6f;

// ThreadSanitizer instruments this program; its races are errors.
#if defined(__SANITIZE_THREAD__)
constexpr bool kDetectsRaces = true;
#else
constexpr bool kDetectsRaces = false;
#endif

inline auto launch_in(Order order) {
    return [order](auto kernel, unsigned n_blocks, unsigned n_threads, const auto& arguments,
                   size_t n_shared_bytes = 0) {
        emulate(n_blocks, n_threads, n_shared_bytes, order, [&] { kernel(arguments); });
    };
}

// Rows [n, n1, n2] in memory.
struct Layout {
    int32_t n, n1, n2;
    int64_t stride1, stride2, offset;

    int32_t n_rows() const { return n1 * n2; }
    size_t begin(int32_t row) const { return offset + row % n1 * stride1 + row / n1 * stride2; }
    size_t size() const { return begin(n_rows() - 1) + n; }
};

// One after the other; as parts of wider rows, which keeps the alignment; at odd addresses.
inline std::vector<Layout> layouts(int32_t n, int32_t n1, int32_t n2) {
    const int64_t wide = n + 8;
    return {{n, n1, n2, n, int64_t{n} * n1, 0},
            {n, n1, n2, wide, wide * n1 + 4, 4},
            {n, n1, n2, n + 3, int64_t{n + 3} * n1 + 2, 1}};
}

// A matrix of rows that are `stride` apart.
inline Layout matrix_layout(int32_t n, int32_t n_rows, int64_t stride, int64_t offset = 0) {
    return {n, n_rows, 1, stride, 0, offset};
}

// Rows of inputs; no float beyond the last row, so that AddressSanitizer sees a read there.
struct Input {
    Input(const Layout& l, const std::vector<float>& packed) : layout(l), values(l.size(), NAN) {
        for (int32_t row = 0; row < l.n_rows(); ++row)
            std::copy_n(packed.begin() + int64_t{row} * l.n, l.n, values.begin() + l.begin(row));
    }
    Input(const Layout& l, uint32_t seed) : Input(l, random_values(int64_t{l.n} * l.n_rows(), seed)) {}

    float* data() { return values.data() + layout.offset; }
    const float* row(int32_t r) const { return values.data() + layout.begin(r); }
    InputRows rows() { return {data(), layout.stride1, layout.stride2}; }
    OutputRows in_place() { return {data(), layout.stride1, layout.stride2, FloatType::f32}; }

    Layout layout;
    std::vector<float> values;
};

// Rows of results, with a byte that no kernel writes around them.
struct Output {
    static constexpr unsigned char kUntouched = 0xa5;

    explicit Output(const Layout& l, FloatType t = FloatType::f32)
        : layout(l), type(t), size(t == FloatType::f32 ? 4 : 2), bytes(l.size() * size, kUntouched) {}

    unsigned char* data() { return bytes.data() + layout.offset * size; }
    float* floats() { return reinterpret_cast<float*>(data()); }
    OutputRows rows() { return {data(), layout.stride1, layout.stride2, type}; }

    float at(int32_t row, int32_t i) const {
        const unsigned char* from = bytes.data() + (layout.begin(row) + i) * size;
        if (type == FloatType::f32) {
            float value;
            std::memcpy(&value, from, sizeof value);
            return value;
        }
        uint16_t bits;
        std::memcpy(&bits, from, sizeof bits);
        return type == FloatType::f16 ? ggml_fp16_to_fp32(bits) : ggml_bf16_to_fp32({bits});
    }
    std::vector<float> packed() const {
        std::vector<float> values;
        for (int32_t row = 0; row < layout.n_rows(); ++row)
            for (int32_t i = 0; i < layout.n; ++i) values.push_back(at(row, i));
        return values;
    }
    // Whether nothing was written between the rows.
    bool has_gaps() const {
        std::vector<bool> is_gap(bytes.size(), true);
        for (int32_t row = 0; row < layout.n_rows(); ++row)
            std::fill_n(is_gap.begin() + layout.begin(row) * size, layout.n * size, false);
        for (size_t i = 0; i < bytes.size(); ++i)
            if (is_gap[i] && bytes[i] != kUntouched) return false;
        return true;
    }

    Layout layout;
    FloatType type;
    size_t size;
    std::vector<unsigned char> bytes;
};

inline bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](float x, float y) {
               return std::memcmp(&x, &y, sizeof x) == 0 || (std::isnan(x) && std::isnan(y));
           });
}

// The indices of the n_used largest of n scores, as the kernels choose them.
inline std::vector<int32_t> exact_top_k(const float* scores, int32_t n, int32_t n_used) {
    const auto value = [&](int32_t i) { return std::isnan(scores[i]) ? -kInfinity : scores[i]; };
    std::vector<int32_t> indices(n);
    std::iota(indices.begin(), indices.end(), 0);
    std::stable_sort(indices.begin(), indices.end(),
                     [&](int32_t a, int32_t b) { return value(a) > value(b); });
    indices.resize(n_used);
    return indices;
}

// A result in exact arithmetic, and the size of the terms that it is a sum of.
struct Exact {
    double value, size;
};

inline double half_ulp(double value, FloatType type) {
    if (type == FloatType::f32 || value == 0.0) return 0.0;
    return type == FloatType::f16 ? std::ldexp(1.0, std::max(std::ilogb(value), -14) - 11)
                                  : std::ldexp(1.0, std::ilogb(value) - 8);
}

// Rounded correctly, up to 1e-6 of the terms.
inline bool is_close(float found, const Exact& exact, FloatType type) {
    if (std::isnan(exact.value)) return std::isnan(found);
    if (std::isinf(exact.value)) return found == exact.value;
    return std::fabs(found - exact.value) <= half_ulp(exact.value, type) + 1e-6 * exact.size;
}

// exact(row, i) -> Exact
template <typename Function>
void check_output(const Output& output, const Function& exact) {
    CHECK(output.has_gaps());
    for (int32_t row = 0; row < output.layout.n_rows(); ++row) {
        for (int32_t i = 0; i < output.layout.n; ++i) {
            const Exact expected = exact(row, i);
            if (is_close(output.at(row, i), expected, output.type)) continue;
            FAIL_CHECK("row ", row, ", element ", i, ": ", output.at(row, i), " instead of ", expected.value);
            return;
        }
    }
}

// 1 / sqrt(mean square + eps); squares beyond float's range are infinite.
template <typename T>
double exact_scale(const T* x, int32_t n) {
    double sum = 0.0;
    for (int32_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
    return 1.0 / std::sqrt(static_cast<double>(static_cast<float>(sum / n)) + kEps);
}

// Every barrier and mask of the kernels that `results` runs, mutated in turn: its bytes must differ in some
// order of threads, or there must be an error (a deadlock, lanes that don't arrive, a race).
template <typename Function>
void check_mutations(const Function& results, int n_barriers, size_t n_mutations) {
    const std::vector<float> expected = results(Order::forward);
    for (const Order order : kOrders) CHECK(same(results(order), expected));
    const std::vector<emulation::Mutation> mutations =
        emulation::mutations_of([&] { results(Order::forward); });
    for (const emulation::Mutation& mutation : mutations) {
        CAPTURE(mutation.text());
        const bool is_barrier = mutation.fault == emulation::Fault::no_barrier;
        n_barriers -= is_barrier;
        if (kDetectsRaces && !is_barrier) continue;  // no race, and a fork takes long
        CHECK_FALSE(emulation::survives(mutation, [&] {
            return std::all_of(std::begin(kOrders), std::end(kOrders),
                               [&](Order order) { return same(results(order), expected); });
        }));
    }
    CHECK(n_barriers == 0);
    CHECK(mutations.size() == n_mutations);
}

}  // namespace

}  // namespace testing
}  // namespace pydiffusion
