// Preparation of expert matmuls: activations as float16, and slots (a token and one of its experts each) by
// expert.
#pragma once

#include <cfloat>
#include <cstdint>

#include "backend/cuda/gelu.cuh"
#include "backend/cuda/weight_formats.cuh"

namespace pydiffusion::cuda {

// Slots that share a tile: `slots[begin ... begin + n)` with the weights of one expert.
struct SlotTile {
    int32_t expert, begin, n;
};

namespace {  // kernels

constexpr int kPackThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kXChunkBytes = 2 * kChunk + 4 * kSixteens;

__device__ __forceinline__ float low_half(uint32_t pair) {
    return half_to_float(static_cast<uint16_t>(pair));
}
__device__ __forceinline__ float high_half(uint32_t pair) {
    return half_to_float(static_cast<uint16_t>(pair >> 16));
}

// What of each warp is needed by all. In a function that is no template: tests fill only such memory with
// NaN.
__device__ __forceinline__ float* pack_memory() {
    __shared__ float of_warps[2 * kPackThreads / 32];
    return of_warps;
}

// Rows of activations, and how they are computed while they are packed.
struct PlainRows {
    const float* x;
    int64_t stride;

    struct Row {
        const float* x;
        __device__ __forceinline__ float at(int i) const { return x[i]; }
    };
    __device__ __forceinline__ Row row(int64_t r, int /*n*/) const { return {x + r * stride}; }
};

struct NormedRows {  // rms_norm of fused_rows.h
    const float* x;
    int64_t stride;
    const float* weight;
    float eps;

    struct Row {
        const float *x, *weight;
        float scale;
        __device__ __forceinline__ float at(int i) const { return x[i] * scale * weight[i]; }
    };
    __device__ __forceinline__ Row row(int64_t r, int n) const {
        float* sums = pack_memory() + kPackThreads / 32;
        const float* from = x + r * stride;
        float sum = 0.0f;
        for (int i = threadIdx.x; i < n; i += kPackThreads) sum += from[i] * from[i];
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
        __syncthreads();
        sum = 0.0f;
        for (int i = 0; i < kPackThreads / 32; ++i) sum += sums[i];
        return {from, weight, 1.0f / sqrtf(sum / static_cast<float>(n) + eps)};
    }
};

struct GatedRows {  // gated_gelu of fused_rows.h
    const float *gate, *up;
    int64_t gate_stride, up_stride;

    struct Row {
        const float *gate, *up;
        __device__ __forceinline__ float at(int i) const { return gelu(gate[i]) * up[i]; }
    };
    __device__ __forceinline__ Row row(int64_t r, int /*n*/) const {
        return {gate + r * gate_stride, up + r * up_stride};
    }
};

// The order of a chunk's values in memory.
enum class PackOrder {
    quads,  // of 32 values, those that a thread of a quad has as operands of mma.sync, then the next thread's
    even_odd,  // of 16 values, the even ones, then the odd ones, as wgmma reads them from shared memory
};

// Writes the sum of a chunk's i-th sixteen: the nearest float16, then what it lacks.
__device__ __forceinline__ void write_sum(unsigned char* chunk, int i, float sum) {
    const uint32_t nearest = half2_of(sum, sum);
    uint16_t* sums = reinterpret_cast<uint16_t*>(chunk + 2 * kChunk);
    sums[i] = static_cast<uint16_t>(nearest);
    const float rest = sum - low_half(nearest);
    sums[kSixteens + i] = static_cast<uint16_t>(half2_of(rest, rest));
}

// A row is packed as float16 times a power of two that scales its maximum to [2^10, 2^11), so that any finite
// row fits, and so do sums of 16.
constexpr int kPackedExponent = 11;
struct PackScale {
    float factor, inverse;
};

__device__ __forceinline__ float power_of_two(int exponent) {
    return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

__device__ __forceinline__ PackScale pack_scale(float maximum) {
    const bool is_known = maximum > 0.0f && maximum <= FLT_MAX;
    const int exponent = is_known ? static_cast<int>(__float_as_uint(maximum) >> 23) - 126 : 0;
    const int scaled = exponent < -100 ? -100 : exponent;
    return {power_of_two(kPackedExponent - scaled), power_of_two(scaled - kPackedExponent)};
}

// Writes values [4 * four, 4 * four + 4) of a packed row; by whole warps, whose lanes have neighbours. A
// chunk of a packed row, kXChunkBytes: 256 values, then the sums of each 16 as the nearest float16, then what
// this lacks.
template <PackOrder order>
__device__ __forceinline__ void pack_four(unsigned char* out, int four, const float (&v)[4]) {
    const uint2 pairs = make_uint2(half2_of(v[0], v[2]), half2_of(v[1], v[3]));
    float sum = low_half(pairs.x) + low_half(pairs.y) + (high_half(pairs.x) + high_half(pairs.y));
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    unsigned char* chunk = out + four / 64 * kXChunkBytes;
    const int in_chunk = four % 64, t = four % 4;
    if constexpr (order == PackOrder::quads) {
        const int sixteen = in_chunk / 4 % 2;
        *reinterpret_cast<uint2*>(chunk + in_chunk / 8 * 64 + 16 * t + 8 * sixteen) = pairs;
    } else {
        unsigned char* sixteen = chunk + in_chunk / 4 * 32;
        *reinterpret_cast<uint32_t*>(sixteen + 4 * t) = pairs.x;
        *reinterpret_cast<uint32_t*>(sixteen + 16 + 4 * t) = pairs.y;
    }
    if (t == 0) write_sum(chunk, in_chunk / 4, sum);
}

// Packs each row; zeros follow n_values. A block for each row.
template <PackOrder order, typename Rows>
__global__ void __launch_bounds__(kPackThreads)
    pack_rows(const Rows rows, int32_t n_values, int32_t n_chunks, unsigned char* out, float* scales) {
    await_previous_kernel();
    float* maxima = pack_memory();
    const auto row = rows.row(blockIdx.x, n_values);
    float maximum = 0.0f;
    for (int i = threadIdx.x; i < n_values; i += kPackThreads) maximum = fmaxf(maximum, fabsf(row.at(i)));
    for (int offset = 16; offset > 0; offset /= 2)
        maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, offset));
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = maximum;
    __syncthreads();
    for (int i = 0; i < kPackThreads / 32; ++i) maximum = fmaxf(maximum, maxima[i]);
    const PackScale scale = pack_scale(maximum);
    out += static_cast<int64_t>(blockIdx.x) * n_chunks * kXChunkBytes;
    // Four values a thread; kPackThreads is a multiple of a chunk's 64 fours, so that no warp diverges.
    for (int four = threadIdx.x; four < n_chunks * kChunk / 4; four += kPackThreads) {
        float v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            v[j] = 4 * four + j < n_values ? row.at(4 * four + j) * scale.factor : 0.0f;
        pack_four<order>(out, four, v);
    }
    if (threadIdx.x == 0) scales[blockIdx.x] = scale.inverse;
}

constexpr int kGroupThreads = 1024, kMaxExperts = 1024;

// Sorts the slots (slot i of a token uses its i-th expert) by expert and cuts each expert's into tiles of at
// most `tile`. One block. ids [n_tokens][stride], the first n_used of each row. An id outside [0, n_experts)
// gets no slot. The order within an expert is that of arrival; a slot's result doesn't depend on it.
__global__ void __launch_bounds__(kGroupThreads)
    group_slots(const int32_t* ids, int64_t stride, int32_t n_used, int32_t n_tokens, int32_t n_experts,
                int32_t tile, int32_t* slots, SlotTile* tiles, int32_t* n_tiles) {
    constexpr int kKept = 4;  // a thread's first slots, of which it keeps the place among their expert's
    __shared__ int32_t counts[kMaxExperts], firsts[kMaxExperts];
    __shared__ int32_t slot_sums[32], tile_sums[32];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    counts[thread] = 0;
    await_previous_kernel();
    const int32_t n = n_tokens * n_used;
    const auto expert_of = [&](int32_t c) {
        if (c >= n) return -1;
        const int32_t id = stride == n_used ? ids[c] : ids[c / n_used * stride + c % n_used];
        return static_cast<uint32_t>(id) < static_cast<uint32_t>(n_experts) ? id : -1;
    };
    int32_t experts[kKept], places[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) experts[i] = expert_of(thread + i * kGroupThreads);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kKept; ++i)
        if (experts[i] >= 0) places[i] = atomicAdd(&counts[experts[i]], 1);
    const int32_t rest = thread + kKept * kGroupThreads;
    for (int32_t c = rest; c < n; c += kGroupThreads)
        if (expert_of(c) >= 0) atomicAdd(&counts[expert_of(c)], 1);
    __syncthreads();
    // Exclusive sums of slots and tiles over the experts.
    const int32_t own = counts[thread], own_tiles = (own + tile - 1) / tile;
    int32_t sum = own, tile_sum = own_tiles;
    for (int offset = 1; offset < 32; offset *= 2) {
        const int32_t a = __shfl_up_sync(kAllLanes, sum, offset);
        const int32_t b = __shfl_up_sync(kAllLanes, tile_sum, offset);
        if (lane >= offset) {
            sum += a;
            tile_sum += b;
        }
    }
    if (lane == 31) {
        slot_sums[warp] = sum;
        tile_sums[warp] = tile_sum;
    }
    __syncthreads();
    if (thread < n_experts) {
        for (int w = 0; w < warp; ++w) {
            sum += slot_sums[w];
            tile_sum += tile_sums[w];
        }
        const int32_t first = sum - own, first_tile = tile_sum - own_tiles;
        firsts[thread] = first;
        if (thread == n_experts - 1) *n_tiles = tile_sum;
        for (int32_t i = 0; i < own_tiles; ++i) {
            const int32_t left = own - i * tile;
            tiles[first_tile + i] = {thread, first + i * tile, left < tile ? left : tile};
        }
    }
    __syncthreads();
    if (n <= kKept * kGroupThreads) {
#pragma unroll
        for (int i = 0; i < kKept; ++i)
            if (experts[i] >= 0) slots[firsts[experts[i]] + places[i]] = thread + i * kGroupThreads;
        return;
    }
    for (int32_t c = thread; c < n; c += kGroupThreads)
        if (expert_of(c) >= 0) slots[atomicAdd(&firsts[expert_of(c)], 1)] = c;
}

}  // namespace

}  // namespace pydiffusion::cuda
