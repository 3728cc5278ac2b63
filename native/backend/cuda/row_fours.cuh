// Shared by the kernels of a layer's rows: rows in memory, four neighbours of a row at a time, and sums over
// the threads of a row in a fixed order.
#pragma once

#include <cstdint>
#include <cstring>

#include "backend/cuda/bfloat16.cuh"
#include "backend/cuda/primitives.cuh"

namespace pydiffusion::cuda {

// Row (i1, i2) begins at data + i1 * stride1 + i2 * stride2. Strides are in elements, here and below.
struct InputRows {
    const float* data;
    int64_t stride1, stride2;
};

enum class FloatType : int32_t { f32, f16, bf16 };

struct OutputRows {
    void* data;
    int64_t stride1, stride2;
    FloatType type;
};

// Whether each row begins at a multiple of four elements, which one instruction can read or write.
inline bool begins_at_four(const void* data, int64_t stride1 = 0, int64_t stride2 = 0, size_t size = 4) {
    return reinterpret_cast<uintptr_t>(data) % (4 * size) == 0 && stride1 % 4 == 0 && stride2 % 4 == 0;
}
inline bool begins_at_four(const InputRows& rows) {
    return begins_at_four(rows.data, rows.stride1, rows.stride2);
}
inline bool begins_at_four(const OutputRows& rows) {
    return begins_at_four(rows.data, rows.stride1, rows.stride2, rows.type == FloatType::f32 ? 4 : 2);
}

namespace {  // of kernels

constexpr int kWarpLanes = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ __forceinline__ const float* begin_of(const InputRows& rows, int32_t i1, int32_t i2) {
    return rows.data + i1 * rows.stride1 + i2 * rows.stride2;
}

// A row of results.
struct OutputRow {
    char* data;
    FloatType type;
};

__device__ __forceinline__ OutputRow begin_of(const OutputRows& rows, int32_t i1, int32_t i2) {
    const int64_t size = rows.type == FloatType::f32 ? 4 : 2;
    return {static_cast<char*>(rows.data) + (i1 * rows.stride1 + i2 * rows.stride2) * size, rows.type};
}

// --- four neighbours of a row ---

struct Four {
    float v[4];
};

// Those at a multiple of 16 bytes.
__device__ __forceinline__ Four read_four(const float* from) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    return {{x.x, x.y, x.z, x.w}};
}
__device__ __forceinline__ void write_four(float* to, const Four& four) {
    *reinterpret_cast<float4*>(to) = make_float4(four.v[0], four.v[1], four.v[2], four.v[3]);
}

__device__ __forceinline__ void add_four(Four& sum, const Four& four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.v[i] += four.v[i];
}

// Elements [at, at + 4) of a row of n, zeros beyond its end. is_aligned: the row begins at a multiple of 16
// bytes, and n is a multiple of 4.
template <bool is_aligned>
__device__ __forceinline__ Four load_four(const float* row, int32_t at, int32_t n) {
    Four four = {};
    if (is_aligned) {
        if (at < n) four = read_four(row + at);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (at + i < n) four.v[i] = row[at + i];
    }
    return four;
}

// Of a norm's weight, which may be null: all ones.
template <bool is_aligned>
__device__ __forceinline__ Four load_weight(const float* weight, int32_t at, int32_t n) {
    return weight ? load_four<is_aligned>(weight, at, n) : Four{{1.0f, 1.0f, 1.0f, 1.0f}};
}

// Two values of a type of 2 bytes, the first in the low half.
__device__ __forceinline__ uint32_t pair_of(float low, float high, FloatType type) {
    return type == FloatType::f16
               ? half2_of(low, high)
               : bfloat16_of(low).bits | static_cast<uint32_t>(bfloat16_of(high).bits) << 16;
}

// Writes elements [at, at + 4) of a row of n, nothing beyond its end.
template <bool is_aligned>
__device__ __forceinline__ void store_four(const OutputRow& row, int32_t at, int32_t n, const Four& four) {
    const float (&v)[4] = four.v;
    if (row.type == FloatType::f32) {
        float* to = reinterpret_cast<float*>(row.data) + at;
        if (is_aligned) {
            if (at < n) write_four(to, four);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (at + i < n) to[i] = v[i];
        }
    } else {
        uint16_t* to = reinterpret_cast<uint16_t*>(row.data) + at;
        const uint2 pairs = make_uint2(pair_of(v[0], v[1], row.type), pair_of(v[2], v[3], row.type));
        if (is_aligned) {
            if (at < n) *reinterpret_cast<uint2*>(to) = pairs;
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (at + i < n) to[i] = static_cast<uint16_t>((i < 2 ? pairs.x : pairs.y) >> 16 * (i % 2));
        }
    }
}

// sum plus the squares of four values
__device__ __forceinline__ float add_squares(float sum, const Four& four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += four.v[i] * four.v[i];
    return sum;
}

// --- the threads of a row ---

// The same in every lane.
__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
    for (int offset = kWarpLanes / 2; offset > 0; offset /= 2)
        value += __shfl_xor_sync(kWholeWarp, value, offset);
    return value;
}

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarpLanes; }
__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarpLanes; }

// A warp for each row, several to a block; rows of up to 512 elements are kept in registers.
struct RowOfWarp {
    static constexpr int kRowThreads = kWarpLanes, kBlockThreads = 128, kKept = 4;

    __device__ static __forceinline__ int32_t row() {
        return static_cast<int32_t>(blockIdx.x) * (kBlockThreads / kWarpLanes) + warp_of_thread();
    }
    __device__ static __forceinline__ int32_t thread() { return lane_of_thread(); }
    __device__ static __forceinline__ float sum(float value) { return sum_of_warp(value); }
};

// A block for each row; rows of up to 3072 elements are kept in registers.
struct RowOfBlock {
    static constexpr int kRowThreads = 384, kBlockThreads = kRowThreads, kKept = 2;
    static constexpr int kWarps = kRowThreads / kWarpLanes;
    struct Pair {
        float first, second;
    };

    __device__ static __forceinline__ int32_t row() { return static_cast<int32_t>(blockIdx.x); }
    __device__ static __forceinline__ int32_t thread() { return static_cast<int32_t>(threadIdx.x); }

    // The same in every thread. sums [kWarps] in shared memory, not used for anything else.
    __device__ static __forceinline__ float sum(float value, float* sums) {
        value = sum_of_warp(value);
        if (lane_of_thread() == 0) sums[warp_of_thread()] = value;
        __syncthreads();
        return sum_of_warps(sums);
    }
    // Once in a kernel.
    __device__ static __forceinline__ float sum(float value) {
        __shared__ float sums[kWarps];
        return sum(value, sums);
    }
    // The same for two values at a time.
    __device__ static __forceinline__ Pair sum(Pair pair, float* firsts, float* seconds) {
        pair = {sum_of_warp(pair.first), sum_of_warp(pair.second)};
        if (lane_of_thread() == 0) {
            firsts[warp_of_thread()] = pair.first;
            seconds[warp_of_thread()] = pair.second;
        }
        __syncthreads();
        return {sum_of_warps(firsts), sum_of_warps(seconds)};
    }

  private:
    __device__ static __forceinline__ float sum_of_warps(const float* sums) {
        float all = 0.0f;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) all += sums[warp];
        return all;
    }
};

// Where a thread's i-th four begins in its row.
template <typename Row>
__device__ __forceinline__ int32_t four_of_thread(int i) {
    return 4 * (Row::thread() + i * Row::kRowThreads);
}

// 1 / sqrt(mean square + eps)
__device__ __forceinline__ float norm_scale(float sum_of_squares, int32_t n, float eps) {
    return 1.0f / sqrtf(sum_of_squares / static_cast<float>(n) + eps);
}

constexpr int32_t kMaxWarpRow = 4 * RowOfWarp::kRowThreads * RowOfWarp::kKept;

}  // namespace

}  // namespace pydiffusion::cuda
