// The kernels of CudaStepBackend: device code only, which the tests also compile for the CPU
// (native/tests/cuda_emulation). Internal linkage: each source file that includes this has its own.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "backend/cuda/bfloat16.cuh"
#include "backend/row_math.h"
#include "sampler/logits.h"

namespace pydiffusion {

namespace {

using row::kLanes;
using row::kMaxGathered;
using row::kThreads;
using row::kWarps;

constexpr float kHalfScale = 16384.0f;  // scales 16-bit probabilities: 1e-8 is then no subnormal float16
constexpr unsigned kAllLanes = 0xffffffffu;

// Calls action(i, x[i]) for a lane's tokens of a range, in their order. Several are read before any is used:
// their latencies overlap.
template <typename Action>
__device__ __forceinline__ void for_each_of_lane(const float* x, row::Range range, const Action& action) {
    constexpr int n_read = 8;
    for (int64_t first = range.begin + threadIdx.x % kLanes; first < range.end; first += n_read * kLanes) {
        float values[n_read];
#pragma unroll
        for (int j = 0; j < n_read; ++j) {
            const int64_t i = first + j * kLanes;
            values[j] = i < range.end ? x[i] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < n_read; ++j) {
            const int64_t i = first + j * kLanes;
            if (i < range.end) action(i, values[j]);
        }
    }
}

// --- sampling statistics: one block per row ---

__device__ row::Sums merge_warp(row::Sums sums, float inverse) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        row::Sums other;
        other.maximum = __shfl_xor_sync(kAllLanes, sums.maximum, offset);
        other.argmax = __shfl_xor_sync(kAllLanes, sums.argmax, offset);
        other.weight = __shfl_xor_sync(kAllLanes, sums.weight, offset);
        other.weighted = __shfl_xor_sync(kAllLanes, sums.weighted, offset);
        other.has_nonfinite = __shfl_xor_sync(kAllLanes, sums.has_nonfinite, offset);
        // The lower lane's sums come first, so that both lanes compute the same.
        const bool lower = (threadIdx.x & offset) == 0;
        sums = lower ? row::merged(sums, other, inverse) : row::merged(other, sums, inverse);
    }
    return sums;
}

// Writes each warp's sums to `warps` [kWarps] in shared memory, and returns the row's sums in every thread.
__device__ row::Sums merge_block(row::Sums sums, float inverse, row::Sums* warps) {
    sums = merge_warp(sums, inverse);
    if (threadIdx.x % kLanes == 0) warps[threadIdx.x / kLanes] = sums;
    __syncthreads();
    row::Sums all = row::empty_sums();
    for (int warp = 0; warp < kWarps; ++warp) all = row::merged(all, warps[warp], inverse);
    return all;
}

__device__ float inclusive_scan(float value) {
    const int lane = threadIdx.x % kLanes;
    for (int offset = 1; offset < kLanes; offset *= 2) {
        const float below = __shfl_up_sync(kAllLanes, value, offset);
        if (lane >= offset) value += below;
    }
    return value;
}

// The token at which the cumulative weight exceeds `target`, in vocabulary order. One warp scans `range`.
__device__ int32_t draw(const float* x, row::Range range, float maximum, float inverse, double target,
                        int32_t last) {
    const int lane = threadIdx.x % kLanes;
    for (int64_t base = range.begin; base < range.end; base += kLanes) {
        const int64_t i = base + lane;
        const bool possible = i < range.end && x[i] >= -FLT_MAX;
        const float weight = possible ? expf(row::scaled(x[i], maximum, inverse)) : 0.0f;
        const float running = inclusive_scan(weight);
        const unsigned passed = __ballot_sync(kAllLanes, possible && target < running);
        if (passed) return static_cast<int32_t>(base + __ffs(passed) - 1);
        const unsigned any = __ballot_sync(kAllLanes, possible);
        if (any) last = static_cast<int32_t>(base + 31 - __clz(any));
        target -= __shfl_sync(kAllLanes, running, kLanes - 1);
    }
    return last;  // the last token with mass, if rounding leaves none
}

__global__ void __launch_bounds__(kThreads) measure_rows(float* logits, int64_t n_vocab, float cap,
                                                         float inverse, const float* u, Measure* measures) {
    __shared__ row::Sums warps[kWarps];
    float* x = logits + static_cast<int64_t>(blockIdx.x) * n_vocab;
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const row::Range own = row::range_of(warp, n_vocab);
    row::Sums sums = row::empty_sums();
    for_each_of_lane(x, own, [&](int64_t i, float value) {
        value = row::capped(value, cap);
        x[i] = value;
        row::add(sums, value, static_cast<int32_t>(i), inverse);
    });
    const row::Sums all = merge_block(sums, inverse, warps);
    if (warp != 0) return;
    Measure result = {0, 0, NAN};
    if (!all.has_nonfinite && all.argmax >= 0) {
        double target = fmax(static_cast<double>(u[blockIdx.x]), 0x1p-25) * all.weight;
        int chosen = 0;
        for (; chosen + 1 < kWarps; ++chosen) {
            row::Sums warp_sums = warps[chosen];
            if (warp_sums.argmax < 0) continue;
            row::rescale(warp_sums, all.maximum, inverse);
            if (target < warp_sums.weight) break;
            target -= warp_sums.weight;
        }
        result.argmax = all.argmax;
        result.sampled = draw(x, row::range_of(chosen, n_vocab), all.maximum, inverse, target, all.argmax);
        result.entropy = fmaxf(0.0f, logf(all.weight) - all.weighted / all.weight);
    }
    if (lane == 0) measures[blockIdx.x] = result;
}

// --- self-conditioning ---

// Computes each row's distribution and how many tokens it keeps; if at most kMaxGathered, also lists them in
// vocabulary order.
__global__ void __launch_bounds__(kThreads)
    find_mass(const float* logits, int64_t n_vocab, float inverse, float dropped_mass,
              row::Distribution* distributions, int32_t* n_kept, int32_t* tokens, float* weights) {
    __shared__ row::Sums warps[kWarps];
    __shared__ row::Tails tails[kWarps];
    __shared__ int chosen;
    const float* x = logits + static_cast<int64_t>(blockIdx.x) * n_vocab;
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const row::Range own = row::range_of(warp, n_vocab);

    row::Sums sums = row::empty_sums();
    for_each_of_lane(
        x, own, [&](int64_t i, float value) { row::add(sums, value, static_cast<int32_t>(i), inverse); });
    const row::Sums all = merge_block(sums, inverse, warps);
    const bool is_valid = !all.has_nonfinite && all.argmax >= 0;
    row::Distribution d = {all.maximum, is_valid ? 1.0f / all.weight : NAN, inverse, 0.0f};

    row::Tails own_tails = {};
    for_each_of_lane(x, own, [&](int64_t, float value) { row::add(own_tails, row::probability(d, value)); });
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        for (int i = 0; i < row::kThresholds; ++i) {
            own_tails.below[i] += __shfl_xor_sync(kAllLanes, own_tails.below[i], offset);
            own_tails.kept[i] += __shfl_xor_sync(kAllLanes, own_tails.kept[i], offset);
        }
    }
    if (lane == 0) tails[warp] = own_tails;
    __syncthreads();
    if (threadIdx.x == 0) {
        double below[row::kThresholds] = {};
        for (int w = 0; w < kWarps; ++w) {
            for (int i = 0; i < row::kThresholds; ++i) below[i] += tails[w].below[i];
        }
        chosen = row::choose_threshold(below, dropped_mass);
    }
    __syncthreads();
    d.threshold = row::threshold(chosen);
    int32_t before = 0, total = 0;
    for (int w = 0; w < kWarps; ++w) {
        if (w == warp) before = total;
        total += tails[w].kept[chosen];
    }
    if (threadIdx.x == 0) {
        distributions[blockIdx.x] = d;
        // A row of NaN keeps no token; the dense path propagates the NaN.
        n_kept[blockIdx.x] = total ? total : INT32_MAX;
    }
    if (total > kMaxGathered) return;
    const int64_t list = static_cast<int64_t>(blockIdx.x) * kMaxGathered;
    for (int64_t base = own.begin; base < own.end; base += kLanes) {
        const int64_t i = base + lane;
        const float p = i < own.end ? row::probability(d, x[i]) : 0.0f;
        const unsigned kept_lanes = __ballot_sync(kAllLanes, p > 0.0f);
        if (p > 0.0f) {
            const int64_t at = list + before + __popc(kept_lanes & ((1u << lane) - 1));
            tokens[at] = static_cast<int32_t>(i);
            weights[at] = p;
        }
        before += __popc(kept_lanes);
    }
}

// Concatenates the lists of the rows that gather; row t's begins at first[t]. first [n + 1].
__global__ void pack_lists(const int32_t* first, const int32_t* tokens, const float* weights,
                           int32_t* packed_tokens, float* packed_weights) {
    const int64_t list = static_cast<int64_t>(blockIdx.x) * kMaxGathered;
    const int32_t begin = first[blockIdx.x], n = first[blockIdx.x + 1] - begin;
    for (int32_t i = threadIdx.x; i < n; i += blockDim.x) {
        packed_tokens[begin + i] = tokens[list + i];
        packed_weights[begin + i] = weights[list + i];
    }
}

// soft[:, t] += scale * weighted sum of t's rows among the gathered rows [from, to).
__global__ void add_gathered(float* soft, const float* rows, const float* weights, const int32_t* first,
                             int32_t from, int32_t to, int64_t d, float scale) {
    const int64_t c = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
    const int32_t begin = max(first[blockIdx.x], from), end = min(first[blockIdx.x + 1], to);
    if (c >= d || begin >= end) return;
    float sum = 0.0f;
    for (int32_t i = begin; i < end; ++i) sum += weights[i] * rows[(i - from) * d + c];
    soft[blockIdx.x * d + c] += scale * sum;
}

__device__ __forceinline__ void store(__half* out, float x) { *out = __float2half(x); }
__device__ __forceinline__ void store(cuda::Bfloat16* out, float x) { *out = cuda::bfloat16_of(x); }

constexpr int kProbabilities = 2048, kProbabilityThreads = 256;  // of a block

// Probabilities of tokens [from, from + n_rows) for the dense positions, times kHalfScale: out [n_rows,
// n_dense]. Grid: kProbabilities rows, positions.
template <typename T>
__global__ void dense_probabilities(T* out, const float* logits, const row::Distribution* distributions,
                                    const int32_t* positions, int64_t n_vocab, int64_t from, int64_t n_rows) {
    const int64_t t = positions[blockIdx.y], first = static_cast<int64_t>(blockIdx.x) * kProbabilities;
    const row::Distribution distribution = distributions[t];
    const float* x = logits + t * n_vocab + from;
    float values[kProbabilities / kProbabilityThreads];
#pragma unroll
    for (int j = 0; j < kProbabilities / kProbabilityThreads; ++j) {
        const int64_t r = first + threadIdx.x + j * kProbabilityThreads;
        values[j] = r < n_rows ? x[r] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kProbabilities / kProbabilityThreads; ++j) {
        const int64_t r = first + threadIdx.x + j * kProbabilityThreads;
        if (r < n_rows)
            store(&out[blockIdx.y * n_rows + r], row::probability(distribution, values[j]) * kHalfScale);
    }
}

__global__ void scatter_rows(float* soft, const float* rows, const int32_t* positions, int64_t d,
                             float scale) {
    const int64_t c = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
    if (c < d) soft[positions[blockIdx.x] * d + c] = scale * rows[blockIdx.x * d + c];
}

__global__ void fill_row(float* x, int64_t n, int32_t token, float value) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) x[i] = i == token ? value : -INFINITY;
}

}  // namespace

}  // namespace pydiffusion
