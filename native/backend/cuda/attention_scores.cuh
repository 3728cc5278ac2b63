// Attention on Hopper (attention_kernels.cuh): the softmax of scores in registers, tile by tile.
#pragma once

#include "backend/cuda/attention_tile.cuh"

namespace pydiffusion::cuda {

constexpr float kLog2E = 1.44269504f;

// The running softmax of a thread's two rows, 8 apart; sums are of its own keys.
struct RunningSoftmax {
    float maximum[2], sum[2];
    float factor[2];  // by which earlier results are to be multiplied
};

// Scores of keys that a row does not see become -infinity. first_key: of this thread.
template <int n>
__device__ __forceinline__ void mask_scores(float (&s)[n][4], const AttentionArguments& a, int32_t row,
                                            int32_t first_key) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int32_t token = (row + 8 * h) / a.group;
        const int32_t first = first_visible(a, token) - first_key, end = end_visible(a, token) - first_key;
#pragma unroll
        for (int j = 0; j < n; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int32_t key = 8 * j + e;
                if (key < first || key >= end) s[j][2 * h + e] = -INFINITY;
            }
        }
    }
}

// exp(s - the running maximum)
template <int n>
__device__ __forceinline__ void exponentials(float (&s)[n][4], RunningSoftmax& softmax) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float maximum = softmax.maximum[h];
#pragma unroll
        for (int j = 0; j < n; ++j) maximum = fmaxf(maximum, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
        maximum = fmaxf(maximum, __shfl_xor_sync(kWholeWarp, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(kWholeWarp, maximum, 2));
        // A row that has seen no key yet has no maximum.
        const float base = maximum == -INFINITY ? 0.0f : maximum * kLog2E;
        // Exactly 1 while the maximum stays, or thousands of tiles would add up the rounding of its
        // logarithm.
        const float before = softmax.maximum[h];
        softmax.factor[h] = before == maximum ? 1.0f : fast_exp2((before - maximum) * kLog2E);
        softmax.maximum[h] = maximum;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < n; ++j) {
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; ++e) {
                s[j][e] = fast_exp2(s[j][e] * kLog2E - base);
                sum += s[j][e];
            }
        }
        softmax.sum[h] = softmax.sum[h] * softmax.factor[h] + sum;
    }
}

template <int n>
__device__ __forceinline__ void pack_weights(uint32_t (&p)[n / 2][4], const float (&s)[n][4]) {
#pragma unroll
    for (int k = 0; k < n / 2; ++k) {
        p[k][0] = packed_half2(s[2 * k][0], s[2 * k][1]);
        p[k][1] = packed_half2(s[2 * k][2], s[2 * k][3]);
        p[k][2] = packed_half2(s[2 * k + 1][0], s[2 * k + 1][1]);
        p[k][3] = packed_half2(s[2 * k + 1][2], s[2 * k + 1][3]);
    }
}

template <int n>
__device__ __forceinline__ void scale_results(float (&o)[n][4], const RunningSoftmax& softmax) {
    // Mostly no row of the warp has a new maximum.
    if (!__any_sync(kWholeWarp, !(softmax.factor[0] == 1.0f && softmax.factor[1] == 1.0f))) return;
#pragma unroll
    for (int j = 0; j < n; ++j) {
        o[j][0] *= softmax.factor[0];
        o[j][1] *= softmax.factor[0];
        o[j][2] *= softmax.factor[1];
        o[j][3] *= softmax.factor[1];
    }
}

}  // namespace pydiffusion::cuda
