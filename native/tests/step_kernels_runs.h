// Runs of the step kernels by the emulation, and the rows of logits for them.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "backend/cuda/step_kernels.cuh"
#include "cuda_emulation/emulate.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

using emulation::emulate;
using emulation::kOrders;
using emulation::Order;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename T>
bool same_bits(const T& a, const T& b) {
    return std::memcmp(&a, &b, sizeof(T)) == 0;
}

inline bool same(float a, float b) { return same_bits(a, b) || (std::isnan(a) && std::isnan(b)); }

inline bool same(const std::vector<float>& a, const std::vector<float>& b) {
    for (size_t i = 0; i < a.size(); ++i)
        if (!same(a[i], b[i])) return false;
    return a.size() == b.size();
}

inline bool same(const Measure& a, const Measure& b) {
    return a.argmax == b.argmax && a.sampled == b.sampled && same(a.entropy, b.entropy);
}

// Rows of logits that are hard in some way, the first three of them finite.
inline std::vector<float> awkward_rows(int64_t n_vocab) {
    std::vector<float> rows = random_values(n_vocab, 1, 12.0f);
    const auto add = [&](float scale, auto change) {
        std::vector<float> row = random_values(n_vocab, 2, scale);
        change(row);
        rows.insert(rows.end(), row.begin(), row.end());
    };
    add(0.0f, [](auto&) {});                                                                // all alike
    add(1e-3f, [](auto& row) { row.front() = row[row.size() / 2] = row.back() = 20.0f; });  // three maxima
    add(1.0f, [](auto& row) { row[row.size() / 3] = NAN; });
    add(1.0f, [](auto& row) { row.back() = kInfinity; });
    add(1e30f, [](auto&) {});
    return rows;
}

inline std::vector<float> uniforms(size_t n) {
    const float values[] = {0.0f, 0.25f, 0.5f, 0.75f, 0.999f, 0x1.fffffep-1f};
    std::vector<float> u(n);
    for (size_t i = 0; i < n; ++i) u[i] = values[i % 6];
    return u;
}

// ThreadSanitizer instruments this program; its races are errors.
#if defined(__SANITIZE_THREAD__)
constexpr bool kDetectsRaces = true;
#else
constexpr bool kDetectsRaces = false;
#endif

// Only one where races are errors: they are in any order.
inline std::vector<Order> orders() {
    return kDetectsRaces ? std::vector<Order>{Order::random}
                         : std::vector<Order>(std::begin(kOrders), std::end(kOrders));
}

// Sizes of vocabularies: one token, a full round of a warp, one more, a chunk, several and a last one that
// isn't full, warps with several chunks. Two under ThreadSanitizer, eight times slower.
inline std::vector<int64_t> vocabularies() {
    return kDetectsRaces ? std::vector<int64_t>{1100}
                         : std::vector<int64_t>{1, 32, 33, 1023, 1024, 3000, 17001};
}

inline dim3 grid_of_chunks(int64_t n_vocab, int64_t n_rows) {
    const int64_t n = row::n_chunks_of(n_vocab);
    return {static_cast<unsigned>((n + kChunksPerBlock - 1) / kChunksPerBlock),
            static_cast<unsigned>(n_rows)};
}

// The sums of chunks of logits, which may be capped.
template <bool kCaps>
std::vector<row::Sums> run_sum_chunks(Order order, std::vector<float>& logits, int64_t n_vocab, float scale) {
    const int64_t n_rows = static_cast<int64_t>(logits.size()) / n_vocab;
    std::vector<row::Sums> chunks(n_rows * row::n_chunks_of(n_vocab), {-7.0f, -7.0f, -7.0f});
    emulate(grid_of_chunks(n_vocab, n_rows), kChunksPerBlock * kLanes, 0, order,
            [&] { sum_chunks<kCaps>(logits.data(), n_vocab, row::soft_cap(30.0f), scale, chunks.data()); });
    return chunks;
}

struct Measured {
    std::vector<float> logits;  // capped
    std::vector<row::Sums> chunks;
    std::vector<Measure> measures;
};

inline Measured run_measure(Order order, const std::vector<float>& logits, int64_t n_vocab, float temperature,
                            const std::vector<float>& u) {
    Measured result = {logits, {}, std::vector<Measure>(logits.size() / n_vocab, {-7, -7, -7.0f})};
    const float scale = row::scale_of(temperature);
    result.chunks = run_sum_chunks<true>(order, result.logits, n_vocab, scale);
    emulate(static_cast<unsigned>(result.measures.size()), kThreads, 0, order, [&] {
        measure_rows(result.logits.data(), n_vocab, result.chunks.data(), scale, u.data(),
                     result.measures.data());
    });
    return result;
}

struct Masses {
    std::vector<row::Distribution> distributions;
    std::vector<int32_t> n_kept, tokens;
    std::vector<float> weights;
};

inline Masses run_find_mass(Order order, std::vector<float> logits, int64_t n_vocab, float scale,
                            float dropped_mass) {
    const size_t n = logits.size() / n_vocab;
    Masses masses = {std::vector<row::Distribution>(n), std::vector<int32_t>(n, -7),
                     std::vector<int32_t>(n * kMaxGathered, -7), std::vector<float>(n * kMaxGathered, -7.0f)};
    const std::vector<row::Sums> chunks = run_sum_chunks<false>(order, logits, n_vocab, scale);
    emulate(static_cast<unsigned>(n), kThreads, row::n_chunks_of(n_vocab) * sizeof(int32_t), order, [&] {
        find_mass(logits.data(), n_vocab, chunks.data(), scale, dropped_mass, masses.distributions.data(),
                  masses.n_kept.data(), masses.tokens.data(), masses.weights.data());
    });
    return masses;
}

// As awkward_rows(), and rows with masked tokens: all but one, all, every other; and steep ones.
inline std::vector<float> masked_rows(int64_t n_vocab) {
    std::vector<float> rows = awkward_rows(n_vocab);
    for (int kind = 0; kind < 5; ++kind) {
        std::vector<float> row = random_values(n_vocab, 7, kind == 3 ? 3.0f : 6.0f);
        for (int64_t i = 0; i < n_vocab; ++i) {
            const bool is_masked = kind == 0 ? i != n_vocab / 2 : kind == 1 || (kind == 2 && i % 2 == 1);
            if (is_masked) row[i] = -kInfinity;
        }
        rows.insert(rows.end(), row.begin(), row.end());
    }
    return rows;
}

}  // namespace

}  // namespace testing
}  // namespace pydiffusion
