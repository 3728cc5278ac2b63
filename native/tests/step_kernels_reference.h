// The step kernels' arithmetic in plain loops, with sums in the kernels' order: lane by lane of each of a
// row's ranges, then lanes pairwise (shuffles), then warp by warp. Results are equal bit by bit.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "backend/row_math.h"
#include "sampler/logits.h"

namespace pydiffusion {
namespace testing {

// Merges what each lane has, as shuffles with 16, 8, 4, 2 and 1 do: merge(lower lane's, higher lane's).
template <typename T, typename Merge>
T merge_lanes(std::array<T, row::kLanes> lanes, const Merge& merge) {
    for (int offset = row::kLanes / 2; offset > 0; offset /= 2)
        for (int lane = 0; lane < offset; ++lane) lanes[lane] = merge(lanes[lane], lanes[lane + offset]);
    return lanes[0];
}

struct RowSums {
    std::array<row::Sums, row::kWarps> warps;
    row::Sums all;
};

inline RowSums reference_sums(const float* x, int64_t n_vocab, float inverse) {
    const auto merge = [&](row::Sums a, row::Sums b) { return row::merged(a, b, inverse); };
    RowSums sums;
    sums.all = row::empty_sums();
    for (int warp = 0; warp < row::kWarps; ++warp) {
        const row::Range range = row::range_of(warp, n_vocab);
        std::array<row::Sums, row::kLanes> lanes;
        lanes.fill(row::empty_sums());
        for (int64_t i = range.begin; i < range.end; ++i)
            row::add(lanes[(i - range.begin) % row::kLanes], x[i], static_cast<int32_t>(i), inverse);
        sums.warps[warp] = merge_lanes(lanes, merge);
        sums.all = merge(sums.all, sums.warps[warp]);
    }
    return sums;
}

// Cumulative sums of 32 weights in the order of a scan by shuffles.
inline std::array<float, row::kLanes> scan(std::array<float, row::kLanes> values) {
    for (int offset = 1; offset < row::kLanes; offset *= 2)
        for (int lane = row::kLanes - 1; lane >= offset; --lane) values[lane] += values[lane - offset];
    return values;
}

inline int32_t reference_draw(const float* x, int64_t n_vocab, const RowSums& sums, float inverse, float u) {
    double target = std::max(static_cast<double>(u), 0x1p-25) * sums.all.weight;
    int warp = 0;
    for (; warp + 1 < row::kWarps; ++warp) {
        row::Sums own = sums.warps[warp];
        if (own.argmax < 0) continue;
        row::rescale(own, sums.all.maximum, inverse);
        if (target < own.weight) break;
        target -= own.weight;
    }
    const row::Range range = row::range_of(warp, n_vocab);
    int32_t last = sums.all.argmax;
    for (int64_t base = range.begin; base < range.end; base += row::kLanes) {
        const int64_t n = std::min<int64_t>(row::kLanes, range.end - base);
        std::array<float, row::kLanes> weights = {};
        for (int64_t i = 0; i < n; ++i)
            weights[i] = expf(row::scaled(x[base + i], sums.all.maximum, inverse));
        const std::array<float, row::kLanes> running = scan(weights);
        for (int64_t i = 0; i < n; ++i)
            if (target < running[i]) return static_cast<int32_t>(base + i);
        last = static_cast<int32_t>(base + n - 1);
        target -= running[row::kLanes - 1];
    }
    return last;
}

// Of capped logits, none of them -infinity.
inline Measure reference_measure(const float* x, int64_t n_vocab, float temperature, float u) {
    const float inverse = row::inverse_temperature(temperature);
    const RowSums sums = reference_sums(x, n_vocab, inverse);
    if (sums.all.has_nonfinite || sums.all.argmax < 0) return {0, 0, NAN};
    const float entropy = logf(sums.all.weight) - sums.all.weighted / sums.all.weight;
    return {sums.all.argmax, reference_draw(x, n_vocab, sums, inverse, u), fmaxf(0.0f, entropy)};
}

// What find_mass finds in one row.
struct Mass {
    row::Distribution distribution;
    int32_t n_kept;
    std::vector<int32_t> tokens;  // none if there are more than kMaxGathered
    std::vector<float> weights;
};

inline Mass reference_mass(const float* x, int64_t n_vocab, float inverse, float dropped_mass) {
    const row::Sums sums = reference_sums(x, n_vocab, inverse).all;
    const bool is_valid = !sums.has_nonfinite && sums.argmax >= 0;
    Mass mass = {{sums.maximum, is_valid ? 1.0f / sums.weight : NAN, inverse, 0.0f}, 0, {}, {}};
    double below[row::kThresholds] = {};
    for (int warp = 0; warp < row::kWarps; ++warp) {
        const row::Range range = row::range_of(warp, n_vocab);
        std::array<row::Tails, row::kLanes> lanes = {};
        for (int64_t i = range.begin; i < range.end; ++i)
            row::add(lanes[(i - range.begin) % row::kLanes], row::probability(mass.distribution, x[i]));
        const row::Tails tails = merge_lanes(lanes, [](row::Tails a, const row::Tails& b) {
            for (int i = 0; i < row::kThresholds; ++i) a.below[i] += b.below[i];
            return a;
        });
        for (int i = 0; i < row::kThresholds; ++i) below[i] += tails.below[i];
    }
    mass.distribution.threshold = row::threshold(row::choose_threshold(below, dropped_mass));
    for (int64_t i = 0; i < n_vocab; ++i) {
        const float p = row::probability(mass.distribution, x[i]);
        if (!(p > 0.0f)) continue;
        mass.tokens.push_back(static_cast<int32_t>(i));
        mass.weights.push_back(p);
    }
    const auto n = static_cast<int32_t>(mass.tokens.size());
    mass.n_kept = n ? n : INT32_MAX;
    if (n > row::kMaxGathered) mass.tokens.clear(), mass.weights.clear();
    return mass;
}

}  // namespace testing
}  // namespace pydiffusion
