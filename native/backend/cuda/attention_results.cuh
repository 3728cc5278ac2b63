// Attention on Hopper (attention_kernels.cuh): results, and those of splits of the keys until they are added.
#pragma once

#include "backend/cuda/attention_scores.cuh"

namespace pydiffusion::cuda {

__device__ __forceinline__ void store_pair(void* out, int64_t at, float first, float second, FloatType type) {
    if (type == FloatType::f32) {
        *reinterpret_cast<float2*>(static_cast<float*>(out) + at) = make_float2(first, second);
    } else {
        *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(out) + at) = pair_of(first, second, type);
    }
}

// Of a block that computed all keys.
__device__ __forceinline__ void store_results(const float (&o)[32][4], const AttentionArguments& a,
                                              const Place& place, const float (&scale)[2], int n_dims) {
    const int32_t row = place.row + place.thread / 32 * 16 + place.lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        if (row + 8 * h >= a.n_tokens * a.group) continue;
        const QueryRow at = query_row(a, row + 8 * h, blockIdx.z);
        const int64_t begin =
            at.token * a.out_token + int64_t{at.head} * n_dims + place.dim + place.lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < 32; ++j)
            store_pair(a.out, begin + 8 * j, o[j][2 * h] * scale[h], o[j][2 * h + 1] * scale[h], a.type);
    }
}

// Index of a warpgroup's results among those of a split.
__device__ __forceinline__ int64_t partial_index(int n_tiles, int i_tile, int kv_head, int n_kv_heads,
                                                 int split, int warpgroup) {
    return ((int64_t{split} * n_kv_heads + kv_head) * n_tiles + i_tile) * 2 + warpgroup;
}

__device__ __forceinline__ void store_partial(const float (&o)[32][4], const Place& place,
                                              const RunningSoftmax& softmax, const float (&scale)[2],
                                              uint4* target, float2* sums) {
    target += place.thread;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        const auto& low = o[2 * j];
        const auto& high = o[2 * j + 1];
        target[j * kWarpgroupThreads] = make_uint4(packed_half2(low[0] * scale[0], low[1] * scale[0]),
                                                   packed_half2(low[2] * scale[1], low[3] * scale[1]),
                                                   packed_half2(high[0] * scale[0], high[1] * scale[0]),
                                                   packed_half2(high[2] * scale[1], high[3] * scale[1]));
    }
    if (place.lane % 4 == 0) {
        sums += place.thread / 32 * 16 + place.lane / 4;
        sums[0] = make_float2(softmax.maximum[0], softmax.sum[0]);
        sums[8] = make_float2(softmax.maximum[1], softmax.sum[1]);
    }
}

// Divides a warpgroup's results by the sums of their weights and writes them.
__device__ __forceinline__ void store_rows(const float (&o)[32][4], const AttentionArguments& a,
                                           const Place& place, RunningSoftmax& softmax, int n_dims) {
    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        softmax.sum[h] += __shfl_xor_sync(kWholeWarp, softmax.sum[h], 1);
        softmax.sum[h] += __shfl_xor_sync(kWholeWarp, softmax.sum[h], 2);
        scale[h] = 1.0f / softmax.sum[h];
        // A split may have seen nothing; all of a row together see something, and what has no weight is NaN.
        if (a.n_splits > 1 && softmax.sum[h] == 0.0f) scale[h] = 0.0f;
    }
    if (a.n_splits == 1) {
        store_results(o, a, place, scale, n_dims);
    } else {
        const int64_t index =
            partial_index(gridDim.x, row_tile(), blockIdx.z, gridDim.z, blockIdx.y, place.warpgroup);
        store_partial(o, place, softmax, scale, a.partial + index * 16 * kWarpgroupThreads,
                      a.sums + index * kAttentionRows);
    }
}

// Of a row tile.
constexpr int kMergeThreads = 256, kMergeBlocks = 2 * 16 * kWarpgroupThreads / kMergeThreads;
// A thread's share of a merge: eight values of two rows, 8 apart, as store_partial() has them. The rows'
// maximum so far, and sums relative to it.
template <int kBatch>
struct MergedRows {
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {}, value[8] = {};

    __device__ __forceinline__ void add(const float2 (&sums)[kBatch][2], const uint4 (&o)[kBatch]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float top = maximum[h];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) top = fmaxf(top, sums[i][h].x);
            const float factor = sum[h] == 0.0f ? 0.0f : fast_exp2((maximum[h] - top) * kLog2E);
            sum[h] *= factor;
#pragma unroll
            for (int k = h; k < 4; k += 2) {
                value[2 * k] *= factor;
                value[2 * k + 1] *= factor;
            }
            maximum[h] = top;
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                // A split that saw no key has the maximum -infinity.
                const float own = sums[i][h].y;
                const float weight = own == 0.0f ? 0.0f : own * fast_exp2((sums[i][h].x - top) * kLog2E);
                const uint32_t pairs[4] = {o[i].x, o[i].y, o[i].z, o[i].w};
                sum[h] += weight;
#pragma unroll
                for (int k = h; k < 4; k += 2) {
                    value[2 * k] += weight * half_to_float(static_cast<uint16_t>(pairs[k]));
                    value[2 * k + 1] += weight * half_to_float(static_cast<uint16_t>(pairs[k] >> 16));
                }
            }
        }
    }
};

// Adds the splits' results, of which a thread reads kBatch at a time. Blocks (row tiles * kMergeBlocks, KV
// heads) of kMergeThreads.
template <typename T, int kBatch>
__global__ void __launch_bounds__(kMergeThreads)
    merge_attention(const __grid_constant__ AttentionArguments a) {
    await_previous_kernel();
    const int index = blockIdx.x * (kMergeThreads / kWarpgroupThreads) + threadIdx.x / kWarpgroupThreads;
    const int j = index % 16, warpgroup = index / 16 % 2, i_tile = index / 32;
    const int n_tiles = gridDim.x / kMergeBlocks;
    const int thread = threadIdx.x % kWarpgroupThreads, lane = thread % 32, row = thread / 32 * 16 + lane / 4;
    MergedRows<kBatch> merged;
    for (int begin = 0; begin < a.n_splits; begin += kBatch) {
        float2 sums[kBatch][2];
        uint4 o[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            sums[i][0] = sums[i][1] = make_float2(-INFINITY, 0.0f);
            o[i] = make_uint4(0, 0, 0, 0);
            if (begin + i >= a.n_splits) continue;
            const int64_t at = partial_index(n_tiles, i_tile, blockIdx.y, gridDim.y, begin + i, warpgroup);
            sums[i][0] = a.sums[at * kAttentionRows + row];
            sums[i][1] = a.sums[at * kAttentionRows + row + 8];
            o[i] = a.partial[(at * 16 + j) * kWarpgroupThreads + thread];
        }
        merged.add(sums, o);
    }
    const int32_t first = T::kSharesRows ? i_tile * T::kRows : i_tile * T::kRows + warpgroup * kAttentionRows;
    const int dim = (T::kSharesRows ? warpgroup * kAttentionDims : 0) + 16 * j + lane % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        if (first + row + 8 * h >= a.n_tokens * a.group) continue;
        const QueryRow at = query_row(a, first + row + 8 * h, blockIdx.y);
        const int64_t begin = at.token * a.out_token + int64_t{at.head} * T::kDims + dim;
        const float scale = 1.0f / merged.sum[h];
#pragma unroll
        for (int k = h; k < 4; k += 2) {
            store_pair(a.out, begin + k / 2 * 8, merged.value[2 * k] * scale, merged.value[2 * k + 1] * scale,
                       a.type);
        }
    }
}

}  // namespace pydiffusion::cuda
