// The router of a mixture of experts: scores = weights * rms_norm(x, norm), in float32, and the choice of
// each token's experts (backend/cpu/top_k.h).
//
// Two kernels. In the first a block multiplies a tile of tokens and experts over a slice of the row, so that
// few tokens fill a GPU too; the second adds the slices' sums, scales them as the norm does, and chooses. The
// order of a score's sum depends on the row's length alone: it is the same in any grid and beside any others.
#pragma once

#include <cstdint>

#include "backend/cuda/row_fours.cuh"

namespace pydiffusion::cuda {

struct RouterArguments {
    const float* x;        // [d, n_tokens]
    const float* norm;     // [d]
    const float* weights;  // [d, n_experts]
    int64_t x_stride, weight_stride;
    float* partial_scores;   // scratch: [padded experts, n_tokens, n_slices], see router_scratch()
    float* partial_squares;  // scratch: [n_tokens, n_slices]
    float* scores;           // [n_experts, n_tokens]
    int32_t* chosen;         // [n_used, n_tokens], the best first; ties in index order, NaN as -infinity
    int64_t score_stride, chosen_stride;
    int32_t d, n_experts, n_used, n_tokens;
    float eps;
};

constexpr int kRouterTile = 64;    // tokens of a block, and its experts
constexpr int kRouterSlice = 176;  // elements of a row that it multiplies
constexpr int32_t kMaxRouted = 256;

inline int32_t router_slices(int32_t d) { return (d + kRouterSlice - 1) / kRouterSlice; }
inline int32_t router_tiles(int32_t n) { return (n + kRouterTile - 1) / kRouterTile; }

// Floats of scratch memory: of partial_scores, then of partial_squares.
struct RouterScratch {
    int64_t scores, squares;
};
inline RouterScratch router_scratch(int32_t d, int32_t n_experts, int32_t n_tokens) {
    const int64_t rows = int64_t{router_slices(d)} * n_tokens;
    return {rows * router_tiles(n_experts) * kRouterTile, rows};
}

// Whether these kernels can compute it: every row begins at a multiple of four elements.
inline bool can_route(const RouterArguments& a) {
    return a.d % 4 == 0 && a.n_experts <= kMaxRouted && a.n_used <= a.n_experts &&
           begins_at_four(a.x, a.x_stride) && begins_at_four(a.norm) &&
           begins_at_four(a.weights, a.weight_stride) && begins_at_four(a.partial_scores);
}

namespace {  // kernels

// --- sums over a slice ---

constexpr int kRouterGroups = 4;  // of two warps each; a group multiplies a quarter of the slice
constexpr int kRouterThreads = 2 * kRouterGroups * kWarpLanes;
constexpr int kSliceFours = kRouterSlice / 4, kGroupFours = kSliceFours / kRouterGroups;
// Floats between rows in shared memory. An odd number of fours: 8 neighbouring rows have no bank in common.
constexpr int kRowPitch = kRouterSlice + 4;
// Between a token's sums in shared memory: those of 4 tokens and 8 experts have no bank in common.
constexpr int kSumPitch = kRouterTile + 8;
constexpr int kRouterSharedBytes = 2 * kRouterTile * kRowPitch * 4;
static_assert(kRouterGroups * kRouterTile * kSumPitch * 4 <= kRouterSharedBytes);
static_assert(kRouterSlice == 16 * kGroupFours && kGroupFours % 2 == 1 && kRowPitch / 4 % 2 == 1);

// Where a thread finds its own 8 tokens and 8 experts in a tile. A warp has 32 tokens and all experts; its
// lanes read neighbouring rows at a time.
struct RouterThread {
    int group, token, expert;
    __device__ __forceinline__ RouterThread()
        : group(warp_of_thread() / 2),
          token(warp_of_thread() % 2 * 32 + lane_of_thread() / 8),
          expert(lane_of_thread() % 8) {}
    __device__ __forceinline__ int token_at(int i) const { return token + 4 * i; }
    __device__ __forceinline__ int expert_at(int i) const { return expert + 8 * i; }
};

// Calls read(row, four) for each four of a tile's rows, each by one thread.
template <typename Read>
__device__ __forceinline__ void for_tile_fours(const Read& read) {
    constexpr int kFours = kRouterTile * kSliceFours;
    static_assert(kFours % kRouterThreads == 0);
#pragma unroll
    for (int i = 0; i < kFours / kRouterThreads; ++i) {
        const int at = static_cast<int>(threadIdx.x) + i * kRouterThreads;
        read(at / kSliceFours, at % kSliceFours);
    }
}

// Four elements of a thread's tokens and experts.
struct RouterOperands {
    Four x[8], w[8];
};

__device__ __forceinline__ void load_operands(RouterOperands& to, const float* x, const float* w, int four) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        to.x[i] = read_four(x + 4 * (i * kRowPitch + four));
        to.w[i] = read_four(w + 8 * i * kRowPitch + 4 * four);
    }
}

__device__ __forceinline__ void multiply_operands(float (&sums)[8][8], const RouterOperands& of) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int j = 0; j < 8; ++j) sums[i][j] += of.x[i].v[c] * of.w[j].v[c];
        }
    }
}

// Squares of a slice of each token's row.
__device__ __forceinline__ void add_slice_squares(const RouterArguments& a, const float* x,
                                                  int32_t first_token, int32_t slice) {
    const int row = static_cast<int>(threadIdx.x) / kRouterGroups, part = threadIdx.x % kRouterGroups;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroupFours; ++i)
        sum = add_squares(sum, read_four(x + row * kRowPitch + 4 * (part * kGroupFours + i)));
    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
    sum += __shfl_xor_sync(kWholeWarp, sum, 2);
    if (part == 0 && first_token + row < a.n_tokens)
        a.partial_squares[int64_t{slice} * a.n_tokens + first_token + row] = sum;
}

__global__ void __launch_bounds__(kRouterThreads, 1) router_partials(RouterArguments a) {
    float* x = reinterpret_cast<float*>(dynamic_shared());
    float* w = x + kRouterTile * kRowPitch;
    // Blocks of a slice follow each other, those with the same tokens too.
    const int32_t n_expert_tiles = (a.n_experts + kRouterTile - 1) / kRouterTile;
    const int32_t n_token_tiles = (a.n_tokens + kRouterTile - 1) / kRouterTile;
    const auto block = static_cast<int32_t>(blockIdx.x);
    const int32_t first_expert = block % n_expert_tiles * kRouterTile;
    const int32_t first_token = block / n_expert_tiles % n_token_tiles * kRouterTile;
    const int32_t slice = block / n_expert_tiles / n_token_tiles, begin = slice * kRouterSlice;

    // Weights may be read before the kernel before this has finished.
    for_tile_fours([&](int row, int four) {
        Four weight = {};
        if (first_expert + row < a.n_experts) {
            weight =
                load_four<true>(a.weights + (first_expert + row) * a.weight_stride, begin + 4 * four, a.d);
            const Four norm = load_four<true>(a.norm, begin + 4 * four, a.d);
#pragma unroll
            for (int i = 0; i < 4; ++i) weight.v[i] *= norm.v[i];
        }
        write_four(w + row * kRowPitch + 4 * four, weight);
    });
    await_previous_kernel();
    for_tile_fours([&](int row, int four) {
        const int32_t at = begin + 4 * four;
        const bool is_inside = first_token + row < a.n_tokens && at < a.d;
        const float* from = is_inside ? a.x + (first_token + row) * a.x_stride + at : a.x;
        copy_async_16(x + row * kRowPitch + 4 * four, from, is_inside ? 16 : 0);
    });
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();

    if (first_expert == 0) add_slice_squares(a, x, first_token, slice);
    const RouterThread own;
    const float* own_x = x + own.token * kRowPitch + 4 * own.group * kGroupFours;
    const float* own_w = w + own.expert * kRowPitch + 4 * own.group * kGroupFours;
    float sums[8][8] = {};
    RouterOperands even, odd;  // one is read while the other is multiplied
    load_operands(even, own_x, own_w, 0);
#pragma unroll 1
    for (int four = 0; four + 1 < kGroupFours; four += 2) {
        load_operands(odd, own_x, own_w, four + 1);
        multiply_operands(sums, even);
        load_operands(even, own_x, own_w, four + 2);
        multiply_operands(sums, odd);
    }
    multiply_operands(sums, even);

    __syncthreads();
    float* of_groups = x;  // [group][token][expert]
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j)
            of_groups[(own.group * kRouterTile + own.token_at(i)) * kSumPitch + own.expert_at(j)] =
                sums[i][j];
    }
    __syncthreads();
    constexpr int kTokenFours = kRouterTile / 4;
    float* out = a.partial_scores + int64_t{slice} * a.n_tokens * n_expert_tiles * kRouterTile + first_expert;
#pragma unroll
    for (int i = 0; i < kRouterTile * kTokenFours / kRouterThreads; ++i) {
        const int at = static_cast<int>(threadIdx.x) + i * kRouterThreads;
        const int token = at / kTokenFours, expert = at % kTokenFours * 4;
        Four sum = {};
#pragma unroll
        for (int group = 0; group < kRouterGroups; ++group) {
            const Four part = read_four(of_groups + (group * kRouterTile + token) * kSumPitch + expert);
#pragma unroll
            for (int c = 0; c < 4; ++c) sum.v[c] = group == 0 ? part.v[c] : sum.v[c] + part.v[c];
        }
        if (first_token + token < a.n_tokens)
            write_four(out + int64_t{first_token + token} * n_expert_tiles * kRouterTile + expert, sum);
    }
}

// --- choice: a warp for each token ---

constexpr int kTopKWarps = 2;

// Orders as the float does, NaN as -infinity and -0 as 0; above 0.
__device__ __forceinline__ uint32_t order_of(float x) {
    x = x == x ? x + 0.0f : -INFINITY;  // -0 + 0 is 0
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Writes the indices of a warp's n_used best. A lane has kPerLane neighbours, so that the lowest of the lanes
// with the largest has the first. order: 0 is none.
template <int kPerLane>
__device__ __forceinline__ void write_top_k(uint32_t (&order)[kPerLane], int32_t n_used, int32_t* chosen) {
    const int lane = lane_of_thread();
    for (int32_t place = 0; place < n_used; ++place) {
        uint32_t own = 0;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) own = max(own, order[i]);
        const uint32_t best = max_of_warp(own);
        if (__ffs(static_cast<int>(__ballot_sync(kWholeWarp, own == best))) - 1 != lane) continue;
        int found = kPerLane;
#pragma unroll
        for (int i = kPerLane - 1; i >= 0; --i) found = order[i] == best ? i : found;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) order[i] = i == found ? 0 : order[i];
        chosen[place] = lane * kPerLane + found;
    }
}

// kFours: fours of scores of a lane.
template <int kFours>
__global__ void __launch_bounds__(kTopKWarps* kWarpLanes) router_choice(RouterArguments a) {
    constexpr int kAtATime = 16;  // slices that are read before any is added
    await_previous_kernel();
    const int32_t token = static_cast<int32_t>(blockIdx.x) * kTopKWarps + warp_of_thread();
    if (token >= a.n_tokens) return;
    const int lane = lane_of_thread();
    const int32_t n_slices = (a.d + kRouterSlice - 1) / kRouterSlice;
    const int32_t n_padded = (a.n_experts + kRouterTile - 1) / kRouterTile * kRouterTile;
    float squares = 0.0f;
    for (int32_t slice = lane; slice < n_slices; slice += kWarpLanes)
        squares += a.partial_squares[int64_t{slice} * a.n_tokens + token];
    Four sums[kFours] = {};
    for (int32_t first = 0; first < n_slices; first += kAtATime) {
        Four parts[kAtATime][kFours];
#pragma unroll
        for (int s = 0; s < kAtATime; ++s) {
            const float* row = a.partial_scores + (int64_t{first + s} * a.n_tokens + token) * n_padded;
#pragma unroll
            for (int i = 0; i < kFours; ++i)
                parts[s][i] =
                    load_four<true>(row, 4 * (lane * kFours + i), first + s < n_slices ? n_padded : 0);
        }
#pragma unroll
        for (int s = 0; s < kAtATime; ++s) {
#pragma unroll
            for (int i = 0; i < 4 * kFours; ++i) sums[i / 4].v[i % 4] += parts[s][i / 4].v[i % 4];
        }
    }
    const float scale = norm_scale(sum_of_warp(squares), a.d, a.eps);
    uint32_t order[4 * kFours];
    float* scores = a.scores + token * a.score_stride;
#pragma unroll
    for (int i = 0; i < 4 * kFours; ++i) {
        const int32_t expert = lane * 4 * kFours + i;
        const float score = sums[i / 4].v[i % 4] * scale;
        order[i] = expert < a.n_experts ? order_of(score) : 0;
        if (expert < a.n_experts) scores[expert] = score;
    }
    write_top_k(order, a.n_used, a.chosen + token * a.chosen_stride);
}

// --- launches ---

// launch(kernel, n_blocks, n_threads, arguments, n_shared_bytes), as in layer_kernels.cuh.
template <typename Launch>
void launch_router(const RouterArguments& a, const Launch& launch) {
    if (a.n_tokens == 0) return;
    const int32_t n_blocks = router_tiles(a.n_experts) * router_tiles(a.n_tokens) * router_slices(a.d);
    launch(router_partials, static_cast<unsigned>(n_blocks), kRouterThreads, a, kRouterSharedBytes);
    const auto choice = a.n_experts <= 4 * kWarpLanes ? router_choice<1> : router_choice<2>;
    launch(choice, static_cast<unsigned>((a.n_tokens + kTopKWarps - 1) / kTopKWarps), kTopKWarps * kWarpLanes,
           a, 0);
}

}  // namespace

}  // namespace pydiffusion::cuda
