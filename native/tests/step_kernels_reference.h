// The step kernels' arithmetic in plain loops, with sums in the kernels' order: lane by lane of each chunk,
// lanes pairwise (shuffles), then the row's chunks likewise, warp by warp. Results are equal bit by bit.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <vector>

#include "backend/cuda/step_kernels.cuh"
#include "backend/row_math.h"
#include "sampler/logits.h"

namespace pydiffusion {
namespace testing {

namespace {

// Adds what each lane has, as shuffles with 16, 8, 4, 2 and 1 do.
inline float sum_lanes(std::array<float, kLanes> lanes) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
        for (int lane = 0; lane < offset; ++lane) lanes[lane] += lanes[lane + offset];
    return lanes[0];
}

inline std::vector<row::Sums> reference_chunks(const float* x, int64_t n_vocab, float scale) {
    std::vector<row::Sums> chunks;
    for (int64_t begin = 0; begin < n_vocab; begin += kChunk) {
        const int64_t end = std::min<int64_t>(n_vocab, begin + kChunk);
        row::Sums sums = {-std::numeric_limits<float>::infinity(), 0.0f, 0.0f};
        for (int64_t i = begin; i < end; ++i) sums.maximum = fmaxf(sums.maximum, x[i]);
        std::array<float, kLanes> weight = {}, weighted = {};
        for (int64_t i = begin; i < begin + kChunk; ++i) {
            row::Sums one = {sums.maximum, 0.0f, 0.0f};
            row::add(one, i < end ? x[i] : -std::numeric_limits<float>::infinity(), scale);
            weight[i % kLanes] += one.weight;
            weighted[i % kLanes] += one.weighted;
        }
        sums.weight = sum_lanes(weight);
        sums.weighted = sum_lanes(weighted);
        chunks.push_back(sums);
    }
    return chunks;
}

// The range of chunks that a warp sums.
struct ChunkRange {
    int64_t begin, end;
};
inline ChunkRange range_of(int warp, int64_t n_chunks) {
    const int64_t per_warp = (n_chunks + kThreads - 1) / kThreads * kLanes;
    return {std::min(n_chunks, warp * per_warp), std::min(n_chunks, (warp + 1) * per_warp)};
}

struct ReferenceSums {
    std::array<float, kWarps> warps;  // weights
    row::Sums all;
};

inline ReferenceSums reference_sums(const std::vector<row::Sums>& chunks, float scale) {
    ReferenceSums sums = {{}, {-std::numeric_limits<float>::infinity(), 0.0f, 0.0f}};
    for (const row::Sums& chunk : chunks) sums.all.maximum = std::max(sums.all.maximum, chunk.maximum);
    for (int warp = 0; warp < kWarps; ++warp) {
        const ChunkRange range = range_of(warp, static_cast<int64_t>(chunks.size()));
        std::array<float, kLanes> weight = {}, weighted = {};
        for (int64_t c = range.begin; c < range.end; ++c) {
            const row::Sums own = row::rescaled(chunks[c], sums.all.maximum, scale);
            weight[(c - range.begin) % kLanes] += own.weight;
            weighted[(c - range.begin) % kLanes] += own.weighted;
        }
        sums.warps[warp] = sum_lanes(weight);
        sums.all.weight += sums.warps[warp];
        sums.all.weighted += sum_lanes(weighted);
    }
    return sums;
}

// Cumulative sums of 32 weights in the order of a scan by shuffles.
inline std::array<float, kLanes> scan(std::array<float, kLanes> values) {
    for (int offset = 1; offset < kLanes; offset *= 2)
        for (int lane = kLanes - 1; lane >= offset; --lane) values[lane] += values[lane - offset];
    return values;
}

// The first of n entries at which the cumulative weight exceeds target, else the last with a weight; target
// becomes what exceeds the weight before it, or infinite.
template <typename WeightOf>
int64_t reference_search(int64_t n, double& target, const WeightOf& weight_of) {
    int64_t last = -1;
    for (int64_t base = 0; base < n; base += kLanes) {
        std::array<float, kLanes> weights = {};
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, n - base); ++i) weights[i] = weight_of(base + i);
        const std::array<float, kLanes> running = scan(weights);
        for (int64_t i = 0; i < kLanes; ++i) {
            if (!(weights[i] > 0.0f)) continue;
            last = base + i;
            if (!(target < running[i])) continue;
            if (i > 0) target -= running[i - 1];
            return last;
        }
        target -= running[kLanes - 1];
    }
    target = std::numeric_limits<double>::infinity();
    return last;
}

// Of capped logits.
inline Measure reference_measure(const float* x, int64_t n_vocab, float temperature, float u) {
    const float scale = row::scale_of(temperature);
    const std::vector<row::Sums> chunks = reference_chunks(x, n_vocab, scale);
    const ReferenceSums sums = reference_sums(chunks, scale);
    if (!row::is_valid(sums.all)) return {0, 0, NAN};
    double target = std::max(static_cast<double>(u), 0x1p-25) * sums.all.weight;
    int warp = -1;
    for (int w = 0; w < kWarps; ++w) {
        if (!(sums.warps[w] > 0.0f)) continue;
        if (warp >= 0) target -= sums.warps[warp];
        warp = w;
        if (target < sums.warps[w]) break;
    }
    const ChunkRange range = range_of(warp, static_cast<int64_t>(chunks.size()));
    const int64_t chunk = range.begin + reference_search(range.end - range.begin, target, [&](int64_t i) {
                              return row::rescaled(chunks[range.begin + i], sums.all.maximum, scale).weight;
                          });
    const int64_t begin = chunk * kChunk, n = std::min<int64_t>(kChunk, n_vocab - begin);
    const int64_t sampled = begin + reference_search(n, target, [&](int64_t i) {
                                return row::power(row::exponent(x[begin + i], sums.all.maximum, scale));
                            });
    const auto argmax = static_cast<int32_t>(std::find(x, x + n_vocab, sums.all.maximum) - x);
    return {argmax, static_cast<int32_t>(sampled), row::entropy(sums.all)};
}

// What find_mass finds in one row.
struct Mass {
    row::Distribution distribution;
    int32_t n_kept;
    std::vector<int32_t> tokens;  // none if there are more than kMaxGathered
    std::vector<float> weights;
};

// Keeps what reaches the i-th threshold.
inline Mass mass_of(const float* x, int64_t n_vocab, row::Distribution d, int i) {
    d.threshold = row::threshold(i);
    Mass mass = {d, INT32_MAX, {}, {}};
    for (int64_t v = 0; v < n_vocab; ++v) {
        const float p = row::probability(d, x[v]);
        if (!(p > 0.0f)) continue;
        mass.tokens.push_back(static_cast<int32_t>(v));
        mass.weights.push_back(p);
    }
    if (!mass.tokens.empty()) mass.n_kept = static_cast<int32_t>(mass.tokens.size());
    return mass;
}

// Masses in double precision; the kernel's are the same for thresholds that aren't next to the limit.
inline Mass reference_mass(const float* x, int64_t n_vocab, float scale, float dropped_mass) {
    const std::vector<row::Sums> chunks = reference_chunks(x, n_vocab, scale);
    const row::Distribution d = row::distribution_of(reference_sums(chunks, scale).all, scale);
    double below[row::kThresholds] = {};
    for (int64_t v = 0; v < n_vocab; ++v) {
        const float p = row::probability(d, x[v]);
        for (int i = 0; i < row::kThresholds; ++i) below[i] += p >= row::threshold(i) ? 0.0f : p;
    }
    int chosen = 0;
    while (!row::may_choose(chosen, below[chosen], dropped_mass)) ++chosen;
    Mass mass = mass_of(x, n_vocab, d, chosen);
    if (mass.n_kept <= kMaxGathered) return mass;
    mass = {mass_of(x, n_vocab, d, row::kThresholds - 1).distribution, INT32_MAX, {}, {}};
    return mass;
}

}  // namespace

}  // namespace testing
}  // namespace pydiffusion
