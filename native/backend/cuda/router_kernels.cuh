// The router of a mixture of experts: scores = weights * x, in float32, and the choice of each token's
// experts (backend/cpu/top_k.h).
//
// Two kernels. In the first a block multiplies a tile of tokens and experts over a slice of the row, so that
// few tokens fill a GPU too; the second adds the slices' sums and chooses. The order of a score's sum depends
// on the row's length alone: it is the same in any grid and beside any others.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/cpu/router_sizes.h"
#include "backend/cuda/row_fours.cuh"

namespace pydiffusion::cuda {

struct RouterArguments {
    const float* x;        // [d, n_tokens], normed
    const float* weights;  // [d, n_experts]
    int64_t x_stride, weight_stride;
    float* partial_scores;  // scratch of router_scratch() floats: [padded experts, n_tokens, n_slices]
    float* scores;          // [n_experts, n_tokens]
    int32_t* chosen;        // [n_used, n_tokens], the best first; ties in index order, NaN as -infinity
    int64_t score_stride, chosen_stride;
    int32_t d, n_experts, n_used, n_tokens;
};

__host__ __device__ inline int32_t router_slices(int32_t d) { return (d + kRouterSlice - 1) / kRouterSlice; }
__host__ __device__ inline int32_t router_tiles(int32_t n) { return (n + kRouterTile - 1) / kRouterTile; }

// Whether these kernels can compute it: every row begins at a multiple of four elements.
inline bool can_route(const RouterArguments& a) {
    return a.d % 4 == 0 && a.n_experts <= kMaxRouted && a.n_used <= a.n_experts &&
           begins_at_four(a.x, a.x_stride) && begins_at_four(a.weights, a.weight_stride) &&
           begins_at_four(a.partial_scores);
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
constexpr int kRouterTileBytes = 2 * kRouterTile * kRowPitch * 4;
static_assert(kRouterGroups * kRouterTile * kSumPitch * 4 <= kRouterTileBytes);
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

// Starts to copy a tile's slice of rows from the first-th on; zeros follow the last row and its end.
__device__ __forceinline__ void copy_tile(float* to, const float* rows, int64_t stride, int32_t first,
                                          int32_t n_rows, int32_t begin, int32_t d) {
    for_tile_fours([&](int row, int four) {
        const int32_t at = begin + 4 * four;
        const bool is_inside = first + row < n_rows && at < d;
        const float* from = is_inside ? rows + (first + row) * stride + at : rows;
        copy_async_16(to + row * kRowPitch + 4 * four, from, is_inside ? 16 : 0);
    });
    copy_async_commit();
}

__global__ void __launch_bounds__(kRouterThreads, 1) router_partials(RouterArguments a) {
    float* x = reinterpret_cast<float*>(dynamic_shared());
    float* w = x + kRouterTile * kRowPitch;
    const int32_t n_expert_tiles = router_tiles(a.n_experts), n_token_tiles = router_tiles(a.n_tokens);
    const auto block = static_cast<int32_t>(blockIdx.x);
    const int32_t first_expert = block % n_expert_tiles * kRouterTile;
    const int32_t first_token = block / n_expert_tiles % n_token_tiles * kRouterTile;
    const int32_t slice = block / n_expert_tiles / n_token_tiles, begin = slice * kRouterSlice;
    // Weights may be read before the kernel before this has finished.
    copy_tile(w, a.weights, a.weight_stride, first_expert, a.n_experts, begin, a.d);
    await_previous_kernel();
    copy_tile(x, a.x, a.x_stride, first_token, a.n_tokens, begin, a.d);
    copy_async_wait<0>();
    __syncthreads();

    const RouterThread own;
    const float* own_x = x + own.token * kRowPitch + 4 * own.group * kGroupFours;
    const float* own_w = w + own.expert * kRowPitch + 4 * own.group * kGroupFours;
    float sums[8][8] = {};
#pragma unroll 1
    for (int four = 0; four < kGroupFours; ++four) {
        Four of_x[8], of_w[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            of_x[i] = read_four(own_x + 4 * (i * kRowPitch + four));
            of_w[i] = read_four(own_w + 8 * i * kRowPitch + 4 * four);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
#pragma unroll
                for (int j = 0; j < 8; ++j) sums[i][j] += of_x[i].v[c] * of_w[j].v[c];
            }
        }
    }

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
        Four sum = read_four(of_groups + token * kSumPitch + expert);
#pragma unroll
        for (int group = 1; group < kRouterGroups; ++group)
            add_four(sum, read_four(of_groups + (group * kRouterTile + token) * kSumPitch + expert));
        if (first_token + token < a.n_tokens)
            write_four(out + int64_t{first_token + token} * n_expert_tiles * kRouterTile + expert, sum);
    }
}

// --- choice ---

// Orders as the float does, NaN as -infinity and -0 as 0; above 0.
__device__ __forceinline__ uint32_t order_of(float x) {
    x = x == x ? x + 0.0f : -INFINITY;  // -0 + 0 is 0
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Writes the indices of a warp's n_used best. A lane has kPerLane neighbours, so that the lowest of the lanes
// with the largest has the first. An order of 0 is never chosen.
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

constexpr int kChoiceWarps = 4, kChoiceThreads = kChoiceWarps * kWarpLanes;

struct alignas(16) ChoiceMemory {
    float of_warps[kChoiceWarps][kMaxRouted];
};

// In a function that is no template: tests fill only such memory with NaN.
__device__ __forceinline__ ChoiceMemory& choice_memory() {
    __shared__ ChoiceMemory memory;
    return memory;
}

// A block for each token: its warps add every fourth slice each, one adds what they have and chooses.
// kFours: fours of scores of a lane.
template <int kFours>
__global__ void __launch_bounds__(kChoiceThreads) router_choice(RouterArguments a) {
    constexpr int kAtATime = 4;  // slices that are read before any is added
    await_previous_kernel();
    const auto token = static_cast<int32_t>(blockIdx.x);
    const int32_t n_slices = router_slices(a.d), n_padded = router_tiles(a.n_experts) * kRouterTile;
    const int lane = lane_of_thread(), first_expert = 4 * kFours * lane;
    Four sums[kFours] = {};
    for (int32_t first = warp_of_thread(); first < n_slices; first += kAtATime * kChoiceWarps) {
        Four parts[kAtATime][kFours];
#pragma unroll
        for (int s = 0; s < kAtATime; ++s) {
            const int32_t slice = first + s * kChoiceWarps;
            const float* row = a.partial_scores + (int64_t{slice} * a.n_tokens + token) * n_padded;
#pragma unroll
            for (int i = 0; i < kFours; ++i)
                parts[s][i] = load_four<true>(row, first_expert + 4 * i, slice < n_slices ? n_padded : 0);
        }
#pragma unroll
        for (int s = 0; s < kAtATime; ++s) {
#pragma unroll
            for (int i = 0; i < kFours; ++i) add_four(sums[i], parts[s][i]);
        }
    }
    ChoiceMemory& shared = choice_memory();
#pragma unroll
    for (int i = 0; i < kFours; ++i)
        write_four(shared.of_warps[warp_of_thread()] + first_expert + 4 * i, sums[i]);
    __syncthreads();
    if (warp_of_thread() > 0) return;
    uint32_t order[4 * kFours];
    float* scores = a.scores + token * a.score_stride;
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
#pragma unroll
        for (int warp = 1; warp < kChoiceWarps; ++warp)
            add_four(sums[i], read_four(shared.of_warps[warp] + first_expert + 4 * i));
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int32_t expert = first_expert + 4 * i + c;
            order[4 * i + c] = expert < a.n_experts ? order_of(sums[i].v[c]) : 0;
            if (expert < a.n_experts) scores[expert] = sums[i].v[c];
        }
    }
    write_top_k(order, a.n_used, a.chosen + token * a.chosen_stride);
}

// --- launches ---

// Shared memory of a block, of what a block may have: more than half, where this is not little. Else two
// blocks are given to a multiprocessor that is free early, and the kernel takes almost twice as long.
inline int32_t router_shared_bytes(int64_t available) {
    return std::max(kRouterTileBytes, static_cast<int32_t>(available / 2 + 1024));
}

// launch(kernel, n_blocks, n_threads, arguments, n_shared_bytes), as in layer_kernels.cuh.
template <typename Launch>
void launch_router(const RouterArguments& a, int32_t n_shared_bytes, const Launch& launch) {
    if (a.n_tokens == 0) return;
    const int32_t n_blocks = router_tiles(a.n_experts) * router_tiles(a.n_tokens) * router_slices(a.d);
    launch(router_partials, static_cast<unsigned>(n_blocks), kRouterThreads, a, n_shared_bytes);
    const auto choice = a.n_experts <= 4 * kWarpLanes ? router_choice<1> : router_choice<2>;
    launch(choice, static_cast<unsigned>(a.n_tokens), kChoiceThreads, a, 0);
}

}  // namespace

}  // namespace pydiffusion::cuda
