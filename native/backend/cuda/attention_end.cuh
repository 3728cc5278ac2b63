// What follows the attention's last matmul: the residual, and its norms for the branches after it, each as
// its branch reads it. One kernel for all, as each alone would mostly wait for memory.
#pragma once

#include <cstdint>

#include "backend/cuda/expert_slots.cuh"
#include "backend/cuda/layer_kernels.cuh"

namespace pydiffusion::cuda {

// add_normed, and norms of its result r: rms_norm(r, dense_norm) and rms_norm(r, router_norm) as rows, and
// rms_norm(r, packed_norm) packed for the experts.
struct AttentionEndArguments {
    AddNormedArguments sum;
    const float *dense_norm, *router_norm, *packed_norm;  // [d]
    OutputRows dense, router;                             // [d, n_tokens]
    unsigned char* packed;                                // as pack_rows() writes them; null: not wanted
    float* packed_scales;
    int32_t n_chunks;
};

namespace {  // kernels

struct AttentionEndMemory {
    float branch_sums[RowOfBlock::kWarps], sums[RowOfBlock::kWarps], maxima[RowOfBlock::kWarps];
};

// In a function that is no template: tests fill only such memory with NaN.
__device__ __forceinline__ AttentionEndMemory& attention_end_memory() {
    __shared__ AttentionEndMemory memory;
    return memory;
}

// Of non-negative values; NaN is the largest.
__device__ __forceinline__ float float_max_of_warp(float value) {
    return __uint_as_float(max_of_warp(__float_as_uint(value)));
}

template <PackOrder order>
__global__ void __launch_bounds__(RowOfBlock::kBlockThreads, 2) end_attention_rows(AttentionEndArguments a) {
    using Row = RowOfBlock;
    constexpr int kKept = Row::kKept;
    AttentionEndMemory& shared = attention_end_memory();
    const int32_t token = Row::row(), d = a.sum.d;
    const auto load = [&](const float* row, int i) {
        return load_four<true>(row, four_of_thread<Row>(i), d);
    };
    // Weights may be read before the kernel before this has finished.
    Four weights[kKept], dense_norms[kKept], router_norms[kKept], packed_norms[kKept] = {};
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        weights[i] = load(a.sum.weight, i);
        dense_norms[i] = load(a.dense_norm, i);
        router_norms[i] = load(a.router_norm, i);
        if (a.packed) packed_norms[i] = load(a.packed_norm, i);
    }
    await_previous_kernel();
    Four r[kKept], branch[kKept];
    float branch_sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        branch[i] = load(a.sum.branch + token * a.sum.branch_stride, i);
        r[i] = load(a.sum.x + token * a.sum.x_stride, i);
    }
#pragma unroll
    for (int i = 0; i < kKept; ++i) branch_sum = add_squares(branch_sum, branch[i]);
    const float branch_scale = norm_scale(Row::sum(branch_sum, shared.branch_sums), d, a.sum.eps);

    const OutputRow out = {reinterpret_cast<char*>(a.sum.out + token * a.sum.out_stride), FloatType::f32};
    float sum = 0.0f, maximum = 0.0f;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            r[i].v[c] += branch[i].v[c] * branch_scale * weights[i].v[c];
            if (a.packed) maximum = fmaxf(maximum, fabsf(r[i].v[c] * packed_norms[i].v[c]));
        }
        sum = add_squares(sum, r[i]);
        store_four<true>(out, four_of_thread<Row>(i), d, r[i]);
    }
    maximum = float_max_of_warp(maximum);
    if (lane_of_thread() == 0) shared.maxima[warp_of_thread()] = maximum;
    const float scale = norm_scale(Row::sum(sum, shared.sums), d, a.sum.eps);
#pragma unroll
    for (int warp = 0; warp < Row::kWarps; ++warp) maximum = fmaxf(maximum, shared.maxima[warp]);

    const PackScale pack = pack_scale(maximum * scale);
    const OutputRow dense = begin_of(a.dense, token, 0), router = begin_of(a.router, token, 0);
    unsigned char* packed = a.packed + int64_t{token} * a.n_chunks * kXChunkBytes;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        Four for_dense, for_router, scaled;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float value = r[i].v[c] * scale;
            for_dense.v[c] = value * dense_norms[i].v[c];
            for_router.v[c] = value * router_norms[i].v[c];
            scaled.v[c] = value * packed_norms[i].v[c] * pack.factor;
        }
        const int32_t at = four_of_thread<Row>(i);
        store_four<true>(dense, at, d, for_dense);
        store_four<true>(router, at, d, for_router);
        // Beyond d all are 0. A chunk's fours are those of two warps.
        if (a.packed && at < a.n_chunks * kChunk) pack_four<order>(packed, at / 4, scaled.v);
    }
    if (a.packed && threadIdx.x == 0) a.packed_scales[token] = pack.inverse;
}

// --- launches ---

constexpr int32_t kMaxEndedRow = 4 * RowOfBlock::kRowThreads * RowOfBlock::kKept;

// Whether the kernel can compute it: rows that begin at multiples of four elements, not too long for
// registers.
inline bool can_end_attention(const AttentionEndArguments& a) {
    const AddNormedArguments& s = a.sum;
    return s.d % 4 == 0 && a.n_chunks * kChunk <= kMaxEndedRow && begins_at_four(s.x, s.x_stride) &&
           begins_at_four(s.branch, s.branch_stride) && begins_at_four(s.out, s.out_stride) &&
           begins_at_four(a.dense) && begins_at_four(a.router) && s.weight && begins_at_four(s.weight) &&
           begins_at_four(a.dense_norm) && begins_at_four(a.router_norm) && begins_at_four(a.packed_norm);
}

template <typename Launch>
void launch_end_attention_rows(const AttentionEndArguments& a, PackOrder order, const Launch& launch) {
    if (a.sum.n_tokens == 0) return;
    const auto kernel = order == PackOrder::quads ? end_attention_rows<PackOrder::quads>
                                                  : end_attention_rows<PackOrder::even_odd>;
    launch(kernel, row_blocks<RowOfBlock>(a.sum.n_tokens), RowOfBlock::kBlockThreads, a);
}

}  // namespace

}  // namespace pydiffusion::cuda
