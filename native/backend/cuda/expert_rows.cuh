// The kernels of a mixture of experts beside its matmuls: the choice of each token's experts
// (backend/cpu/top_k.h), and the end of a layer (join_branches of backend/cpu/fused_rows.h). Results don't
// depend on the grid, and launch_*(arguments, launch) are as in layer_kernels.cuh.
#pragma once

#include <cstdint>

#include "backend/cuda/layer_kernels.cuh"
#include "backend/cuda/router_kernels.cuh"

namespace pydiffusion::cuda {

// top_k: the indices of the n_used largest of each token's scores, largest first. Ties are in index order;
// NaN compares as -infinity.
struct TopKArguments {
    const float* scores;  // [n_scores, n_tokens]
    int32_t* chosen;      // [n_used, n_tokens]
    int64_t score_stride, chosen_stride;
    int32_t n_scores;  // 1 to kMaxScores
    int32_t n_used;    // 1 to n_scores
    int32_t n_tokens;
};
constexpr int32_t kMaxScores = 1024;

// join_branches: (x + rms_norm(rms_norm(dense, dense_norm) + rms_norm(mixture, mixture_norm), norm)) * scale,
// where mixture[:, t] is the sum over i of w[i] * expert_scales[chosen[i, t]] * experts[:, i, t], and w the
// softmax of the chosen experts' scores / sqrt(d). A score that is not finite, of any expert, makes w NaN.
// Unless next.data is null, also its rms_norm(next_norm): the input of the layer after it.
struct JoinArguments {
    const float *x, *dense;                 // [d, n_tokens]
    const float* experts;                   // [d, n_used, n_tokens], outputs of the chosen experts
    const float* scores;                    // [n_experts, n_tokens]
    const int32_t* chosen;                  // [n_used, n_tokens], the best first
    float* out;                             // [d, n_tokens], may be x or dense
    int64_t x_stride, dense_stride;         // of tokens
    int64_t expert_stride, experts_stride;  // of a token's experts; of tokens
    int64_t score_stride, chosen_stride, out_stride;
    const float* expert_scales;                     // [n_experts]
    const float *dense_norm, *mixture_norm, *norm;  // [d]
    const float* scale;                             // [1]
    int32_t d, n_experts;
    int32_t n_used;  // 1 to kMaxUsed
    int32_t n_tokens;
    float eps;
    OutputRows next;         // [d, n_tokens]
    const float* next_norm;  // [d]
};
constexpr int32_t kMaxUsed = 128;

namespace {  // kernels

// --- choice of experts: a warp for each token ---

constexpr int kTopKWarps = 2;

template <int kPerLane>
__global__ void __launch_bounds__(kTopKWarps* kWarpLanes) top_k_rows(TopKArguments a) {
    await_previous_kernel();
    const int32_t token = static_cast<int32_t>(blockIdx.x) * kTopKWarps + warp_of_thread();
    if (token >= a.n_tokens) return;
    const float* scores = a.scores + token * a.score_stride;
    const int lane = lane_of_thread();
    uint32_t order[kPerLane];  // 0: beyond the row, or chosen
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const int32_t index = lane * kPerLane + i;
        order[i] = index < a.n_scores ? order_of(scores[index]) : 0;
    }
    write_top_k(order, a.n_used, a.chosen + token * a.chosen_stride);
}

// --- end of a layer: a block for each token ---

// Writes the chosen experts' weights in the sum; by one warp.
__device__ __forceinline__ void route_token(const JoinArguments& a, int32_t token, float* weights) {
    constexpr int kPerLane = kMaxUsed / kWarpLanes;
    const float* scores = a.scores + token * a.score_stride;
    const int32_t* chosen = a.chosen + token * a.chosen_stride;
    const int lane = lane_of_thread();
    // All reads come before any use of them, so that they overlap.
    float score[kPerLane] = {}, expert_scale[kPerLane] = {};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        if (lane + i * kWarpLanes < a.n_used) {
            const int32_t expert = chosen[lane + i * kWarpLanes];
            score[i] = scores[expert];
            expert_scale[i] = a.expert_scales[expert];
        }
    }
    float sum = 0.0f;
    for (int32_t e = lane; e < a.n_experts; e += kWarpLanes) sum += scores[e] - scores[e];  // 0, or NaN
    const float best = __shfl_sync(kWholeWarp, score[0], 0), factor = 1.0f / sqrtf(static_cast<float>(a.d));
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        score[i] = lane + i * kWarpLanes < a.n_used ? expf((score[i] - best) * factor) : 0.0f;
        sum += score[i];
    }
    sum = sum_of_warp(sum);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
        if (lane + i * kWarpLanes < a.n_used)
            weights[lane + i * kWarpLanes] = score[i] * (expert_scale[i] / sum);
}

__device__ __forceinline__ void add_weighted(Four& sum, const Four& values, float weight) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.v[i] += weight * values.v[i];
}

// Shared memory of join_rows, in a function that is no template: tests fill only such memory with NaN.
struct JoinMemory {
    float weights[kMaxUsed];
    float dense_sums[RowOfBlock::kWarps], mixture_sums[RowOfBlock::kWarps], sums[RowOfBlock::kWarps];
    float next_sums[RowOfBlock::kWarps];
};

__device__ __forceinline__ JoinMemory& join_memory() {
    __shared__ JoinMemory memory;
    return memory;
}

template <bool is_aligned>
__global__ void __launch_bounds__(RowOfBlock::kBlockThreads, 2) join_rows(JoinArguments a) {
    await_previous_kernel();
    using Row = RowOfBlock;
    constexpr int kKept = Row::kKept;
    constexpr int kAtATime = 4;  // experts whose rows are read before any is added
    JoinMemory& shared = join_memory();
    const float* weights = shared.weights;
    const int32_t token = Row::row();
    const float *x = a.x + token * a.x_stride, *dense = a.dense + token * a.dense_stride;
    const float* experts = a.experts + token * a.experts_stride;
    const OutputRow out = {reinterpret_cast<char*>(a.out + token * a.out_stride), FloatType::f32};
    const auto load = [&](const float* row, int32_t at) { return load_four<is_aligned>(row, at, a.d); };

    // The last warp has the fewest elements. Meanwhile the others read the first experts' rows.
    if (warp_of_thread() == Row::kWarps - 1) route_token(a, token, shared.weights);
    Four dense_kept[kKept], mixture_kept[kKept] = {};
#pragma unroll
    for (int i = 0; i < kKept; ++i) dense_kept[i] = load(dense, four_of_thread<Row>(i));
    for (int32_t first = 0; first < a.n_used; first += kAtATime) {
        Four rows[kAtATime][kKept];
#pragma unroll
        for (int e = 0; e < kAtATime; ++e) {
            if (first + e < a.n_used) {
#pragma unroll
                for (int i = 0; i < kKept; ++i)
                    rows[e][i] = load(experts + (first + e) * a.expert_stride, four_of_thread<Row>(i));
            }
        }
        if (first == 0) __syncthreads();
#pragma unroll
        for (int e = 0; e < kAtATime; ++e) {
            if (first + e < a.n_used) {
#pragma unroll
                for (int i = 0; i < kKept; ++i) add_weighted(mixture_kept[i], rows[e][i], weights[first + e]);
            }
        }
    }
    // Elements that registers have no room for are read and added again for each use.
    const int32_t rest = four_of_thread<Row>(kKept), step = 4 * Row::kRowThreads;
    const auto mixture = [&](int32_t at) {
        Four sum = {};
        for (int32_t i = 0; i < a.n_used; ++i)
            add_weighted(sum, load(experts + i * a.expert_stride, at), weights[i]);
        return sum;
    };

    float dense_sum = 0.0f, mixture_sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        dense_sum = add_squares(dense_sum, dense_kept[i]);
        mixture_sum = add_squares(mixture_sum, mixture_kept[i]);
    }
    for (int32_t at = rest; at < a.d; at += step) {
        dense_sum = add_squares(dense_sum, load(dense, at));
        mixture_sum = add_squares(mixture_sum, mixture(at));
    }
    Four dense_norms[kKept], mixture_norms[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        dense_norms[i] = load(a.dense_norm, four_of_thread<Row>(i));
        mixture_norms[i] = load(a.mixture_norm, four_of_thread<Row>(i));
    }
    const Row::Pair both =
        Row::sum(Row::Pair{dense_sum, mixture_sum}, shared.dense_sums, shared.mixture_sums);
    const float dense_scale = norm_scale(both.first, a.d, a.eps);
    const float mixture_scale = norm_scale(both.second, a.d, a.eps);

    const auto joined = [&](const Four& of_dense, const Four& dense_norm, const Four& of_mixture,
                            const Four& mixture_norm) {
        Four result;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            result.v[i] = of_dense.v[i] * dense_scale * dense_norm.v[i] +
                          of_mixture.v[i] * mixture_scale * mixture_norm.v[i];
        return result;
    };
    const auto joined_at = [&](int32_t at) {
        return joined(load(dense, at), load(a.dense_norm, at), mixture(at), load(a.mixture_norm, at));
    };
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        mixture_kept[i] = joined(dense_kept[i], dense_norms[i], mixture_kept[i], mixture_norms[i]);
        sum = add_squares(sum, mixture_kept[i]);
    }
    for (int32_t at = rest; at < a.d; at += step) sum = add_squares(sum, joined_at(at));
    const float layer_scale = *a.scale;
    Four residual[kKept], norms[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        residual[i] = load(x, four_of_thread<Row>(i));
        norms[i] = load(a.norm, four_of_thread<Row>(i));
    }
    const float scale = norm_scale(Row::sum(sum, shared.sums), a.d, a.eps);

    float next_sum = 0.0f;
    const auto finish = [&](int32_t at, const Four& from, const Four& branches, const Four& norm) {
        Four result;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            result.v[i] = (from.v[i] + branches.v[i] * scale * norm.v[i]) * layer_scale;
        store_four<is_aligned>(out, at, a.d, result);
        next_sum = add_squares(next_sum, result);
        return result;
    };
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        residual[i] = finish(four_of_thread<Row>(i), residual[i], mixture_kept[i], norms[i]);
        if (a.next.data) norms[i] = load(a.next_norm, four_of_thread<Row>(i));
    }
    for (int32_t at = rest; at < a.d; at += step) finish(at, load(x, at), joined_at(at), load(a.norm, at));

    if (!a.next.data) return;
    const float next_scale = norm_scale(Row::sum(next_sum, shared.next_sums), a.d, a.eps);
    const OutputRow next = begin_of(a.next, token, 0);
    const auto finish_next = [&](int32_t at, const Four& of, const Four& norm) {
        Four result;
#pragma unroll
        for (int i = 0; i < 4; ++i) result.v[i] = of.v[i] * next_scale * norm.v[i];
        store_four<is_aligned>(next, at, a.d, result);
    };
#pragma unroll
    for (int i = 0; i < kKept; ++i) finish_next(four_of_thread<Row>(i), residual[i], norms[i]);
    const float* written = a.out + token * a.out_stride;  // by this thread
    for (int32_t at = rest; at < a.d; at += step) finish_next(at, load(written, at), load(a.next_norm, at));
}

// --- launches ---

template <typename Launch>
void launch_top_k_rows(const TopKArguments& a, const Launch& launch) {
    if (a.n_tokens == 0) return;
    const auto kernel = a.n_scores <= 4 * kWarpLanes ? top_k_rows<4> : top_k_rows<kMaxScores / kWarpLanes>;
    launch(kernel, blocks_for(a.n_tokens, kTopKWarps), kTopKWarps * kWarpLanes, a);
}

template <typename Launch>
void launch_join_rows(const JoinArguments& a, const Launch& launch) {
    if (a.n_tokens == 0) return;
    const bool is_aligned =
        a.d % 4 == 0 && begins_at_four(a.x, a.x_stride) && begins_at_four(a.dense, a.dense_stride) &&
        begins_at_four(a.experts, a.expert_stride, a.experts_stride) && begins_at_four(a.out, a.out_stride) &&
        begins_at_four(a.dense_norm) && begins_at_four(a.mixture_norm) && begins_at_four(a.norm) &&
        begins_at_four(a.next) && begins_at_four(a.next_norm);
    const auto kernel = is_aligned ? join_rows<true> : join_rows<false>;
    launch(kernel, row_blocks<RowOfBlock>(a.n_tokens), RowOfBlock::kBlockThreads, a);
}

}  // namespace

}  // namespace pydiffusion::cuda
