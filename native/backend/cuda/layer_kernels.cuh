// The row-wise kernels of a layer between two matmuls: those of backend/cpu/fused_rows.h, each as one kernel.
// The order of a row's sums depends on its length alone: a row's result is the same in any grid, at any
// alignment and beside any other rows.
//
// launch_*(arguments, launch) choose the kernel, and call launch(kernel, n_blocks, n_threads, arguments) for
// it, unless there are no rows.
#pragma once

#include <cstdint>

#include "backend/cuda/gelu.cuh"
#include "backend/cuda/row_fours.cuh"

namespace pydiffusion::cuda {

// rms_norm: x / sqrt(mean of squares of its row + eps) * weight
struct NormArguments {
    InputRows x;          // [n, n1, n_rows / n1]
    OutputRows out;       // shaped as x; may be x if of float32
    const float* weight;  // [n], or null: ones
    int32_t n, n1;        // row r is (r % n1, r / n1)
    int32_t n_rows;       // n1 times the other dimension
    float eps;
};

// rotate_normed: rms_norm(x, weight), then RoPE: rotates elements i and i + head_dim / 2 of a head by an
// angle whose cosine is angles[i] and whose sine is angles[i + head_dim / 2]. Of up to three kinds of heads
// at a time, as rotate_and_store has them.
struct RotateNormedArguments {
    struct Heads {
        InputRows x;          // [head_dim, n_heads, n_tokens]
        OutputRows out;       // shaped as x; may be x if of float32
        const float* weight;  // [head_dim], or null: ones
        int32_t n_heads;
        bool is_rotated;
    } heads[3];
    int32_t n_kinds;
    const float* angles;   // [head_dim, n_tokens]
    int64_t angle_stride;  // of tokens
    int32_t head_dim;      // even
    int32_t n_tokens;
    float eps;

    // Groups of up to so many heads of one kind.
    __host__ __device__ int32_t n_groups_of(int32_t kind, int32_t n_together) const {
        return (heads[kind].n_heads + n_together - 1) / n_together;
    }
    __host__ __device__ int32_t n_groups(int32_t n_together) const {
        int32_t sum = 0;
        for (int32_t i = 0; i < n_kinds; ++i) sum += n_groups_of(i, n_together);
        return sum;
    }
};

// add_normed: out = x + rms_norm(branch, weight)
struct AddNormedArguments {
    const float *x, *branch;  // [d, n_tokens]
    float* out;               // [d, n_tokens], may be x or branch
    int64_t x_stride, branch_stride, out_stride;
    const float* weight;  // [d], or null: ones
    int32_t d, n_tokens;
    float eps;
};

// gated_gelu: gelu_tanh(gate) * up
struct GatedGeluArguments {
    InputRows gate, up;  // [n, n1, n_rows / n1]; they may be parts of one row
    OutputRows out;      // of the same shape; may be gate or up if of float32
    int32_t n, n1;       // row r is (r % n1, r / n1)
    int32_t n_rows;      // n * n_rows < 2^31
};

namespace {  // kernels

// --- RMS norm ---

template <typename Row, bool is_aligned>
__global__ void __launch_bounds__(Row::kBlockThreads) norm_rows(NormArguments a) {
    // Weights may be read before the kernel before this has finished; all else that is read comes before the
    // sum, so that the reads overlap.
    Four kept[Row::kKept], weights[Row::kKept];
#pragma unroll
    for (int i = 0; i < Row::kKept; ++i)
        weights[i] = load_weight<is_aligned>(a.weight, four_of_thread<Row>(i), a.n);
    await_previous_kernel();
    const int32_t row = Row::row();
    if (row >= a.n_rows) return;
    const int32_t i1 = row % a.n1, i2 = row / a.n1;
    const float* x = begin_of(a.x, i1, i2);
#pragma unroll
    for (int i = 0; i < Row::kKept; ++i) kept[i] = load_four<is_aligned>(x, four_of_thread<Row>(i), a.n);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < Row::kKept; ++i) sum = add_squares(sum, kept[i]);
    const int32_t rest = four_of_thread<Row>(Row::kKept), step = 4 * Row::kRowThreads;
    for (int32_t at = rest; at < a.n; at += step) sum = add_squares(sum, load_four<is_aligned>(x, at, a.n));
    const float scale = norm_scale(Row::sum(sum), a.n, a.eps);

    const auto normed = [&](const Four& four, const Four& weight) {
        Four result;
#pragma unroll
        for (int i = 0; i < 4; ++i) result.v[i] = four.v[i] * scale * weight.v[i];
        return result;
    };
    const OutputRow out = begin_of(a.out, i1, i2);
#pragma unroll
    for (int i = 0; i < Row::kKept; ++i)
        store_four<is_aligned>(out, four_of_thread<Row>(i), a.n, normed(kept[i], weights[i]));
    for (int32_t at = rest; at < a.n; at += step) {
        const Four weight = load_weight<is_aligned>(a.weight, at, a.n);
        store_four<is_aligned>(out, at, a.n, normed(load_four<is_aligned>(x, at, a.n), weight));
    }
}

// --- RMS norm and RoPE: a warp for several heads of a token ---

// Four elements of each half of a head.
struct Halves {
    Four low, high;
};

template <bool is_aligned>
__device__ __forceinline__ Halves load_halves(const float* row, int32_t at, int32_t half) {
    return {load_four<is_aligned>(row, at, half), load_four<is_aligned>(row + half, at, half)};
}

constexpr int kRotateThreads = 64, kRotateWarps = kRotateThreads / kWarpLanes;

// The kind of a block's heads, which are one token's, and the first of them.
struct HeadsOfBlock {
    int32_t kind, first, token;
};

template <int kHeads>
__device__ __forceinline__ HeadsOfBlock heads_of_block(const RotateNormedArguments& a) {
    constexpr int32_t kTogether = kRotateWarps * kHeads;
    const int32_t n_groups = a.n_groups(kTogether), block = static_cast<int32_t>(blockIdx.x);
    HeadsOfBlock own = {0, block % n_groups, block / n_groups};
    for (; own.first >= a.n_groups_of(own.kind, kTogether); ++own.kind)
        own.first -= a.n_groups_of(own.kind, kTogether);
    own.first *= kTogether;
    return own;
}

// A warp's heads share weights and angles, which are read once, and their reads overlap. kKept: fours of a
// half that a lane keeps in registers.
template <bool is_aligned, int kKept, int kHeads>
__global__ void __launch_bounds__(kRotateThreads) rotate_normed_rows(RotateNormedArguments a) {
    using Row = RowOfWarp;
    const HeadsOfBlock of_block = heads_of_block<kHeads>(a);
    const RotateNormedArguments::Heads& kind = a.heads[of_block.kind];
    const int32_t token = of_block.token, first = of_block.first + warp_of_thread() * kHeads;
    const int32_t half = a.head_dim / 2;
    const float *weight = kind.weight, *angles = a.angles + token * a.angle_stride;
    const auto load_weights = [&](int32_t at) {
        return Halves{load_weight<is_aligned>(weight, at, half),
                      load_weight<is_aligned>(weight ? weight + half : nullptr, at, half)};
    };
    const auto load_angles = [&](int32_t at) {
        if (kind.is_rotated) return load_halves<is_aligned>(angles, at, half);
        return Halves{{{1.0f, 1.0f, 1.0f, 1.0f}}, {}};
    };
    // Weights may be read before the kernel before this has finished.
    Halves weights[kKept], rotations[kKept], kept[kHeads][kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) weights[i] = load_weights(four_of_thread<Row>(i));
    await_previous_kernel();
    const auto input = [&](int h) { return begin_of(kind.x, first + h, token); };
    const auto is_head = [&](int h) { return first + h < kind.n_heads; };
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int i = 0; i < kKept; ++i)
            kept[h][i] =
                is_head(h) ? load_halves<is_aligned>(input(h), four_of_thread<Row>(i), half) : Halves{};
    }
#pragma unroll
    for (int i = 0; i < kKept; ++i) rotations[i] = load_angles(four_of_thread<Row>(i));
    const int32_t rest = four_of_thread<Row>(kKept), step = 4 * Row::kRowThreads;
    float scales[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kKept; ++i) sum = add_squares(add_squares(sum, kept[h][i].low), kept[h][i].high);
        for (int32_t at = rest; is_head(h) && at < half; at += step) {
            const Halves more = load_halves<is_aligned>(input(h), at, half);
            sum = add_squares(add_squares(sum, more.low), more.high);
        }
        scales[h] = norm_scale(Row::sum(sum), a.head_dim, a.eps);
    }

    const auto rotate = [&](int h, int32_t at, const Halves& from, const Halves& weight_at,
                            const Halves& rotation) {
        Halves to;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float low = from.low.v[i] * scales[h] * weight_at.low.v[i];
            const float high = from.high.v[i] * scales[h] * weight_at.high.v[i];
            const float cosine = rotation.low.v[i], sine = rotation.high.v[i];
            to.low.v[i] = kind.is_rotated ? low * cosine - high * sine : low;
            to.high.v[i] = kind.is_rotated ? low * sine + high * cosine : high;
        }
        const OutputRow out = begin_of(kind.out, first + h, token);
        store_four<is_aligned>(out, at, half, to.low);
        store_four<is_aligned>({out.data + half * (out.type == FloatType::f32 ? 4 : 2), out.type}, at, half,
                               to.high);
    };
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        if (!is_head(h)) continue;
#pragma unroll
        for (int i = 0; i < kKept; ++i)
            rotate(h, four_of_thread<Row>(i), kept[h][i], weights[i], rotations[i]);
        for (int32_t at = rest; at < half; at += step)
            rotate(h, at, load_halves<is_aligned>(input(h), at, half), load_weights(at), load_angles(at));
    }
}

// --- residual ---

template <typename Row, bool is_aligned>
__global__ void __launch_bounds__(Row::kBlockThreads) add_normed_rows(AddNormedArguments a) {
    Four kept[Row::kKept], residual[Row::kKept], weights[Row::kKept];
#pragma unroll
    for (int i = 0; i < Row::kKept; ++i)
        weights[i] = load_weight<is_aligned>(a.weight, four_of_thread<Row>(i), a.d);
    await_previous_kernel();
    const int32_t token = Row::row();
    if (token >= a.n_tokens) return;
    const float *x = a.x + token * a.x_stride, *branch = a.branch + token * a.branch_stride;
    const OutputRow out = {reinterpret_cast<char*>(a.out + token * a.out_stride), FloatType::f32};
#pragma unroll
    for (int i = 0; i < Row::kKept; ++i) {
        const int32_t at = four_of_thread<Row>(i);
        kept[i] = load_four<is_aligned>(branch, at, a.d);
        residual[i] = load_four<is_aligned>(x, at, a.d);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < Row::kKept; ++i) sum = add_squares(sum, kept[i]);
    const int32_t rest = four_of_thread<Row>(Row::kKept), step = 4 * Row::kRowThreads;
    for (int32_t at = rest; at < a.d; at += step)
        sum = add_squares(sum, load_four<is_aligned>(branch, at, a.d));
    const float scale = norm_scale(Row::sum(sum), a.d, a.eps);

    const auto add = [&](int32_t at, const Four& to, const Four& from, const Four& weight) {
        Four result;
#pragma unroll
        for (int i = 0; i < 4; ++i) result.v[i] = to.v[i] + from.v[i] * scale * weight.v[i];
        store_four<is_aligned>(out, at, a.d, result);
    };
#pragma unroll
    for (int i = 0; i < Row::kKept; ++i) add(four_of_thread<Row>(i), residual[i], kept[i], weights[i]);
    for (int32_t at = rest; at < a.d; at += step)
        add(at, load_four<is_aligned>(x, at, a.d), load_four<is_aligned>(branch, at, a.d),
            load_weight<is_aligned>(a.weight, at, a.d));
}

// --- gated GELU: four elements a thread ---

constexpr int kGeluThreads = 256;

template <bool is_aligned>
__global__ void __launch_bounds__(kGeluThreads) gated_gelu_rows(GatedGeluArguments a) {
    await_previous_kernel();
    const auto n_fours = static_cast<uint32_t>(a.n + 3) / 4;
    const uint32_t four = blockIdx.x * kGeluThreads + threadIdx.x;
    const auto row = static_cast<int32_t>(four / n_fours);
    if (row >= a.n_rows) return;
    const auto at = static_cast<int32_t>(4 * (four % n_fours));
    const int32_t i1 = row % a.n1, i2 = row / a.n1;
    const Four gate = load_four<is_aligned>(begin_of(a.gate, i1, i2), at, a.n);
    const Four up = load_four<is_aligned>(begin_of(a.up, i1, i2), at, a.n);
    Four result;
#pragma unroll
    for (int i = 0; i < 4; ++i) result.v[i] = gelu(gate.v[i]) * up.v[i];
    store_four<is_aligned>(begin_of(a.out, i1, i2), at, a.n, result);
}

}  // namespace

// --- launches ---

namespace {

constexpr unsigned blocks_for(int64_t n, int64_t per_block) {
    return static_cast<unsigned>((n + per_block - 1) / per_block);
}

template <typename Row>
constexpr unsigned row_blocks(int64_t n_rows) {
    return blocks_for(n_rows, Row::kBlockThreads / Row::kRowThreads);
}

template <typename Row, bool is_aligned, typename Launch>
void launch_norm_rows_with(const NormArguments& a, const Launch& launch) {
    const auto kernel = norm_rows<Row, is_aligned>;
    launch(kernel, row_blocks<Row>(a.n_rows), Row::kBlockThreads, a);
}

template <typename Launch>
void launch_norm_rows(const NormArguments& a, const Launch& launch) {
    if (a.n_rows == 0) return;
    const bool is_aligned =
        a.n % 4 == 0 && begins_at_four(a.x) && begins_at_four(a.out) && begins_at_four(a.weight);
    if (a.n <= kMaxWarpRow) {
        is_aligned ? launch_norm_rows_with<RowOfWarp, true>(a, launch)
                   : launch_norm_rows_with<RowOfWarp, false>(a, launch);
    } else {
        is_aligned ? launch_norm_rows_with<RowOfBlock, true>(a, launch)
                   : launch_norm_rows_with<RowOfBlock, false>(a, launch);
    }
}

template <bool is_aligned, int kKept, int kHeads, typename Launch>
void launch_rotate_normed_rows_with(const RotateNormedArguments& a, const Launch& launch) {
    const auto kernel = rotate_normed_rows<is_aligned, kKept, kHeads>;
    const int32_t n_blocks = a.n_groups(kRotateWarps * kHeads) * a.n_tokens;
    launch(kernel, static_cast<unsigned>(n_blocks), kRotateThreads, a);
}

template <typename Launch>
void launch_rotate_normed_rows(const RotateNormedArguments& a, const Launch& launch) {
    if (a.n_groups(1) == 0 || a.n_tokens == 0) return;
    bool is_aligned = a.head_dim % 8 == 0 && begins_at_four(a.angles, a.angle_stride);
    for (int i = 0; i < a.n_kinds; ++i) {
        const RotateNormedArguments::Heads& heads = a.heads[i];
        is_aligned = is_aligned && begins_at_four(heads.x) && begins_at_four(heads.out) &&
                     begins_at_four(heads.weight);
    }
    if (!is_aligned) {
        launch_rotate_normed_rows_with<false, 2, 1>(a, launch);
    } else if (a.head_dim <= 8 * kWarpLanes) {
        launch_rotate_normed_rows_with<true, 1, 2>(a, launch);
    } else {
        launch_rotate_normed_rows_with<true, 2, 1>(a, launch);
    }
}

template <typename Launch>
void launch_add_normed_rows(const AddNormedArguments& a, const Launch& launch) {
    if (a.n_tokens == 0) return;
    const bool is_aligned = a.d % 4 == 0 && begins_at_four(a.x, a.x_stride) &&
                            begins_at_four(a.branch, a.branch_stride) &&
                            begins_at_four(a.out, a.out_stride) && begins_at_four(a.weight);
    if (a.d <= kMaxWarpRow) {
        const auto kernel = is_aligned ? add_normed_rows<RowOfWarp, true> : add_normed_rows<RowOfWarp, false>;
        launch(kernel, row_blocks<RowOfWarp>(a.n_tokens), RowOfWarp::kBlockThreads, a);
    } else {
        const auto kernel =
            is_aligned ? add_normed_rows<RowOfBlock, true> : add_normed_rows<RowOfBlock, false>;
        launch(kernel, row_blocks<RowOfBlock>(a.n_tokens), RowOfBlock::kBlockThreads, a);
    }
}

template <typename Launch>
void launch_gated_gelu_rows(const GatedGeluArguments& a, const Launch& launch) {
    const int64_t n_fours = int64_t{a.n_rows} * ((a.n + 3) / 4);
    if (n_fours == 0) return;
    const bool is_aligned =
        a.n % 4 == 0 && begins_at_four(a.gate) && begins_at_four(a.up) && begins_at_four(a.out);
    const auto kernel = is_aligned ? gated_gelu_rows<true> : gated_gelu_rows<false>;
    launch(kernel, blocks_for(n_fours, kGeluThreads), kGeluThreads, a);
}

}  // namespace

}  // namespace pydiffusion::cuda
