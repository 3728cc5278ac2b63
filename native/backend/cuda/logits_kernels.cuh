// The kernels of CudaStepBackend that read whole rows of logits: device code only, which the tests also
// compile for the CPU (native/tests/cuda_emulation). Internal linkage: each source file that includes this
// has its own.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "backend/cuda/primitives.cuh"
#include "backend/row_math.h"
#include "sampler/logits.h"

namespace pydiffusion {

namespace {

using row::kChunk;
using row::kLanes;
using row::kMaxGathered;

constexpr int kWarps = 16, kThreads = kWarps * kLanes;  // of a block per row
constexpr int kChunksPerBlock = 8;                      // of sum_chunks, one per warp
constexpr int kPerLane = kChunk / kLanes;
constexpr unsigned kAllLanes = 0xffffffffu;

// A lane's j-th token of a chunk.
__device__ __forceinline__ int64_t token_of_lane(int j) { return j * kLanes + threadIdx.x % kLanes; }

// A lane's values of a chunk x, of n tokens; others are -infinity.
__device__ __forceinline__ void load_chunk(const float* x, int64_t n, float (&values)[kPerLane]) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) values[j] = token_of_lane(j) < n ? x[token_of_lane(j)] : -INFINITY;
}

__device__ __forceinline__ float warp_maximum(float value) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
        value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
    return value;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
    return value;
}

template <typename T>
__device__ __forceinline__ T inclusive_scan(T value) {
    const int lane = threadIdx.x % kLanes;
    for (int offset = 1; offset < kLanes; offset *= 2) {
        const T below = __shfl_up_sync(kAllLanes, value, offset);
        if (lane >= offset) value += below;
    }
    return value;
}

// --- sums of chunks: one warp each; grid: kChunksPerBlock chunks, rows ---

// Soft-caps a lane's values of a chunk, and writes them back.
__device__ __forceinline__ void cap_chunk(float* x, int64_t n, row::SoftCap cap, float (&values)[kPerLane]) {
    bool is_small = true;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) is_small = is_small && !(fabsf(values[j]) > cap.cap);
    if (__all_sync(kAllLanes, is_small)) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) values[j] = cap.small(values[j]);
    } else {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) values[j] = cap(values[j]);
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
        const bool is_token = token_of_lane(j) < n;
        if (is_token) x[token_of_lane(j)] = values[j];
        values[j] = is_token ? values[j] : -INFINITY;  // where there was none, it is capped too
    }
}

template <bool kCaps>
__global__ void __launch_bounds__(kChunksPerBlock* kLanes)
    sum_chunks(float* logits, int64_t n_vocab, row::SoftCap cap, float scale, row::Sums* chunks) {
    const int64_t n_chunks = row::n_chunks_of(n_vocab);
    const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kChunksPerBlock + threadIdx.x / kLanes;
    if (chunk >= n_chunks) return;
    float* x = logits + blockIdx.y * n_vocab + chunk * kChunk;
    const int64_t n = n_vocab - chunk * kChunk;
    float values[kPerLane];
    load_chunk(x, n, values);
    if constexpr (kCaps) cap_chunk(x, n, cap, values);
    float maximum = -INFINITY;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) maximum = fmaxf(maximum, values[j]);
    row::Sums sums = {warp_maximum(maximum), 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) row::add(sums, values[j], scale);
    sums.weight = warp_sum(sums.weight);
    sums.weighted = warp_sum(sums.weighted);
    if (threadIdx.x % kLanes == 0) chunks[blockIdx.y * n_chunks + chunk] = sums;
}

// --- sums of a row: one block ---

// The chunks of a row, of which a warp sums a range, lane by lane.
struct Chunks {
    const row::Sums* sums;
    int64_t n;
    float scale;

    __device__ int64_t per_warp() const { return (n + kThreads - 1) / kThreads * kLanes; }
    __device__ int64_t begin_of(int warp) const { return min(n, warp * per_warp()); }
    // Calls action(chunk, its sums) for the lane's chunks of its warp's range.
    template <typename Action>
    __device__ void for_each_of_lane(const Action& action) const {
        const int warp = threadIdx.x / kLanes;
        for (int64_t c = begin_of(warp) + threadIdx.x % kLanes; c < begin_of(warp + 1); c += kLanes)
            action(c, sums[c]);
    }
};

struct RowSums {
    row::Sums all;
    int32_t first;  // the first chunk with the maximum; -1 if there is none
};

// In shared memory.
struct WarpSums {
    float maximum[kWarps], weight[kWarps], weighted[kWarps];
    int32_t first[kWarps];
};

// The row's sums in every thread; each warp's, relative to the row's maximum, in `warps`.
__device__ RowSums sum_row(const Chunks& chunks, WarpSums& warps) {
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    float maximum = -INFINITY;
    int32_t first = -1;
    chunks.for_each_of_lane([&](int64_t c, const row::Sums& sums) {
        if (sums.maximum > maximum) maximum = sums.maximum, first = static_cast<int32_t>(c);
    });
    const float of_warp = warp_maximum(maximum);
    first = first >= 0 && maximum == of_warp ? first : INT32_MAX;
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
        first = min(first, __shfl_xor_sync(kAllLanes, first, offset));
    if (lane == 0) warps.maximum[warp] = of_warp, warps.first[warp] = first;
    __syncthreads();
    RowSums row = {{-INFINITY, 0.0f, 0.0f}, -1};
    for (int w = 0; w < kWarps; ++w)
        if (warps.maximum[w] > row.all.maximum)
            row.all.maximum = warps.maximum[w], row.first = warps.first[w];

    float weight = 0.0f, weighted = 0.0f;
    chunks.for_each_of_lane([&](int64_t, const row::Sums& sums) {
        const row::Sums own = row::rescaled(sums, row.all.maximum, chunks.scale);
        weight += own.weight;
        weighted += own.weighted;
    });
    weight = warp_sum(weight);
    weighted = warp_sum(weighted);
    if (lane == 0) warps.weight[warp] = weight, warps.weighted[warp] = weighted;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
        row.all.weight += warps.weight[w];
        row.all.weighted += warps.weighted[w];
    }
    return row;
}

// Looks for the first of some entries at which their cumulative weight exceeds `target`, 32 at a time.
struct Search {
    double target;
    int64_t found;  // that entry; until there is one, the last with a weight

    // Of the entries base + lane; returns whether it is one of them, and leaves in `target` what exceeds the
    // weight before it.
    __device__ bool next(float weight, int64_t base) {
        const float running = inclusive_scan(weight);
        const unsigned passed = __ballot_sync(kAllLanes, weight > 0.0f && target < running);
        const unsigned any = __ballot_sync(kAllLanes, weight > 0.0f);
        const int lane = passed ? __ffs(passed) - 1 : kLanes;
        if (any) found = base + (passed ? lane : 31 - __clz(any));
        const float before = __shfl_sync(kAllLanes, running, max(lane, 1) - 1);
        if (lane > 0) target -= before;
        return passed != 0;
    }
};

// The token at which the cumulative weight exceeds `target`, in vocabulary order, else the last with mass.
// One warp.
__device__ int32_t draw(const float* x, int64_t n_vocab, const Chunks& chunks, const WarpSums& warps,
                        const RowSums& row, double target) {
    const int lane = threadIdx.x % kLanes;
    int chosen = -1;
    for (int w = 0; w < kWarps; ++w) {
        if (!(warps.weight[w] > 0.0f)) continue;
        if (chosen >= 0) target -= warps.weight[chosen];
        chosen = w;
        if (target < warps.weight[w]) break;
    }
    Search search = {target, row.first};
    const int64_t end = chunks.begin_of(chosen + 1);
    bool is_passed = false;
    for (int64_t base = chunks.begin_of(chosen); base < end && !is_passed; base += kLanes) {
        const int64_t c = base + lane;
        const float weight =
            c < end ? row::rescaled(chunks.sums[c], row.all.maximum, chunks.scale).weight : 0.0f;
        is_passed = search.next(weight, base);
    }
    if (!is_passed) search.target = INFINITY;  // rounding: the last token with mass
    const int64_t begin = search.found * kChunk;
    float values[kPerLane];
    load_chunk(x + begin, n_vocab - begin, values);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
        const float weight = row::power(row::exponent(values[j], row.all.maximum, chunks.scale));
        if (search.next(weight, begin + j * kLanes)) break;
    }
    return static_cast<int32_t>(search.found);
}

// The first token with the row's maximum. One warp.
__device__ int32_t first_maximum(const float* x, int64_t n_vocab, const RowSums& row) {
    const int64_t begin = static_cast<int64_t>(row.first) * kChunk;
    float values[kPerLane];
    load_chunk(x + begin, n_vocab - begin, values);
    int64_t first = begin;
#pragma unroll
    for (int j = kPerLane - 1; j >= 0; --j) {
        const unsigned equal = __ballot_sync(kAllLanes, values[j] == row.all.maximum);
        if (equal) first = begin + j * kLanes + __ffs(equal) - 1;
    }
    return static_cast<int32_t>(first);
}

__global__ void __launch_bounds__(kThreads)
    measure_rows(const float* logits, int64_t n_vocab, const row::Sums* sums, float scale, const float* u,
                 Measure* measures) {
    __shared__ WarpSums warps;
    const float* x = logits + static_cast<int64_t>(blockIdx.x) * n_vocab;
    const int64_t n = row::n_chunks_of(n_vocab);
    const Chunks chunks = {sums + blockIdx.x * n, n, scale};
    const RowSums row = sum_row(chunks, warps);
    const int warp = threadIdx.x / kLanes;
    const bool writes = threadIdx.x % kLanes == 0;
    Measure& measure = measures[blockIdx.x];
    if (!row::is_valid(row.all)) {
        if (threadIdx.x == 0) measure = {0, 0, NAN};
    } else if (warp == 0) {
        const double target = fmax(static_cast<double>(u[blockIdx.x]), 0x1p-25) * row.all.weight;
        const int32_t sampled = draw(x, n_vocab, chunks, warps, row, target);
        if (writes) measure.sampled = sampled, measure.entropy = row::entropy(row.all);
    } else if (warp == 1) {
        const int32_t argmax = first_maximum(x, n_vocab, row);
        if (writes) measure.argmax = argmax;
    }
}

// --- self-conditioning ---

// Calls action(chunk) for the chunks of this warp, which has every kWarps-th, with a probability of at least
// `least`.
template <typename Action>
__device__ void for_each_chunk(const Chunks& chunks, const row::Distribution& d, float least,
                               const Action& action) {
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    for (int64_t base = warp; base < chunks.n; base += kThreads) {
        const int64_t c = base + lane * kWarps;
        const float p = c < chunks.n ? row::probability(d, chunks.sums[c].maximum) : 0.0f;
        for (unsigned left = __ballot_sync(kAllLanes, p >= least); left; left &= left - 1)
            action(base + (__ffs(left) - 1) * kWarps);
    }
}

// The probabilities of a chunk's tokens.
__device__ __forceinline__ void load_probabilities(const float* x, int64_t n_vocab, int64_t chunk,
                                                   const row::Distribution& d, float (&p)[kPerLane]) {
    load_chunk(x + chunk * kChunk, n_vocab - chunk * kChunk, p);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) p[j] = row::probability(d, p[j]);
}

// In shared memory. Sums for a threshold alternate, so that one barrier each is enough.
struct WarpTails {
    float unread[kWarps][row::kThresholds];
    float below[2][kWarps];
    int32_t kept[2][kWarps];
    int32_t listed[kWarps];
};

// The mass of the chunks without a token that reaches a threshold, warp by warp, in `shared`.
__device__ void sum_unread(const Chunks& chunks, const row::Distribution& d, WarpTails& shared) {
    float below[row::kThresholds] = {};
    chunks.for_each_of_lane([&](int64_t, const row::Sums& sums) {
        const float mass = row::rescaled(sums, d.maximum, d.scale).weight * d.norm;
        const float largest = row::probability(d, sums.maximum);
#pragma unroll
        for (int i = 0; i < row::kThresholds; ++i) below[i] += largest >= row::threshold(i) ? 0.0f : mass;
    });
#pragma unroll
    for (int i = 0; i < row::kThresholds; ++i) {
        const float of_warp = warp_sum(below[i]);
        if (threadIdx.x % kLanes == 0) shared.unread[threadIdx.x / kLanes][i] = of_warp;
    }
}

// Finds the largest threshold with a mass of at most dropped_mass below it. Returns how many tokens reach it,
// or more than kMaxGathered where no threshold does with fewer; in n_kept [chunks.n], in shared memory, those
// of each chunk. Only chunks with a token that reaches the thresholds tried are read: the mass of the others
// is known.
__device__ int32_t choose_threshold(const float* x, int64_t n_vocab, const Chunks& chunks, float dropped_mass,
                                    row::Distribution& d, WarpTails& shared, int32_t* n_kept) {
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const row::Distribution all = d;
    sum_unread(chunks, all, shared);
    for (int64_t c = threadIdx.x; c < chunks.n; c += kThreads) n_kept[c] = 0;
    __syncthreads();
    for (int i = 0;; ++i) {
        double below = 0.0;
        for (int w = 0; w < kWarps; ++w) below += shared.unread[w][i];
        if (!row::may_choose(i, below, dropped_mass)) continue;
        d.threshold = row::threshold(i);
        float own_below = 0.0f;
        int32_t own_kept = 0;
        for_each_chunk(chunks, all, d.threshold, [&](int64_t c) {
            float p[kPerLane];
            load_probabilities(x, n_vocab, c, all, p);
            int32_t n = 0;
#pragma unroll
            for (int j = 0; j < kPerLane; ++j) {
                const bool keep = p[j] >= d.threshold;
                own_below += keep ? 0.0f : p[j];
                n += __popc(__ballot_sync(kAllLanes, keep));
            }
            if (lane == 0) n_kept[c] = n;
            own_kept += n;
        });
        own_below = warp_sum(own_below);
        if (lane == 0) shared.below[i % 2][warp] = own_below, shared.kept[i % 2][warp] = own_kept;
        __syncthreads();
        int32_t kept = 0;
        for (int w = 0; w < kWarps; ++w) {
            below += shared.below[i % 2][w];
            kept += shared.kept[i % 2][w];
        }
        if (kept > kMaxGathered || row::may_choose(i, below, dropped_mass)) return kept;
    }
}

// Lists the tokens kept, in vocabulary order.
__device__ void list_kept(const float* x, int64_t n_vocab, const Chunks& chunks, const row::Distribution& d,
                          WarpTails& shared, int32_t* n_kept, int32_t* tokens, float* weights) {
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    // n_kept becomes the tokens kept in this and earlier chunks of the warp's range.
    int32_t running = 0;
    const int64_t end = chunks.begin_of(warp + 1);
    for (int64_t base = chunks.begin_of(warp); base < end; base += kLanes) {
        const bool is_own = base + lane < end;
        const int32_t n = running + inclusive_scan(is_own ? n_kept[base + lane] : 0);
        if (is_own) n_kept[base + lane] = n;
        running = __shfl_sync(kAllLanes, n, kLanes - 1);
    }
    if (lane == 0) shared.listed[warp] = running;
    __syncthreads();
    for_each_chunk(chunks, d, d.threshold, [&](int64_t c) {
        const int range = static_cast<int>(c / chunks.per_warp());
        int32_t at = c > chunks.begin_of(range) ? n_kept[c - 1] : 0;
        for (int w = 0; w < range; ++w) at += shared.listed[w];
        float p[kPerLane];
        load_probabilities(x, n_vocab, c, d, p);
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
            const unsigned kept = __ballot_sync(kAllLanes, p[j] > 0.0f);
            if (p[j] > 0.0f) {
                const int32_t own = at + __popc(kept & ((1u << lane) - 1));
                tokens[own] = static_cast<int32_t>(c * kChunk + j * kLanes + lane);
                weights[own] = p[j];
            }
            at += __popc(kept);
        }
    });
}

// Computes each row's distribution and how many tokens it keeps; if at most kMaxGathered, also lists them in
// vocabulary order, else n_kept is INT32_MAX. Dynamic shared memory: an int32 per chunk.
__global__ void __launch_bounds__(kThreads)
    find_mass(const float* logits, int64_t n_vocab, const row::Sums* sums, float scale, float dropped_mass,
              row::Distribution* distributions, int32_t* n_kept, int32_t* tokens, float* weights) {
    __shared__ WarpSums warps;
    __shared__ WarpTails tails;
    const float* x = logits + static_cast<int64_t>(blockIdx.x) * n_vocab;
    const int64_t n = row::n_chunks_of(n_vocab);
    const Chunks chunks = {sums + blockIdx.x * n, n, scale};
    const RowSums row = sum_row(chunks, warps);
    row::Distribution d = row::distribution_of(row.all, scale);
    auto* kept_of_chunks = reinterpret_cast<int32_t*>(cuda::dynamic_shared());
    int32_t kept = INT32_MAX;
    if (row::is_valid(row.all) && row::entropy(row.all) <= row::most_entropy_gathered(dropped_mass, n_vocab))
        kept = choose_threshold(x, n_vocab, chunks, dropped_mass, d, tails, kept_of_chunks);
    const bool is_dense = kept > kMaxGathered;
    if (is_dense) d.threshold = row::threshold(row::kThresholds - 1);
    if (threadIdx.x == 0) {
        distributions[blockIdx.x] = d;
        n_kept[blockIdx.x] = is_dense ? INT32_MAX : kept;
    }
    if (is_dense) return;
    const int64_t list = static_cast<int64_t>(blockIdx.x) * kMaxGathered;
    list_kept(x, n_vocab, chunks, d, tails, kept_of_chunks, tokens + list, weights + list);
}

// Makes a row's tokens -infinity, except one. chunks: the row's, or null.
__global__ void fill_row(float* x, int64_t n, int32_t token, float value, row::Sums* chunks) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    x[i] = i == token ? value : -INFINITY;
    if (!chunks || i % kChunk) return;
    const bool has_token = i / kChunk == token / kChunk;
    chunks[i / kChunk] = has_token ? row::Sums{value, 1.0f, 0.0f} : row::Sums{-INFINITY, 0.0f, 0.0f};
}

}  // namespace

}  // namespace pydiffusion
