// Attention on Hopper (attention_kernels.cuh): tiles, arguments, and what each block and thread has of them.
#pragma once

#include "backend/cuda/hopper_tiles.cuh"
#include "backend/cuda/row_fours.cuh"

namespace pydiffusion::cuda {

constexpr int kAttentionDims = 256;  // of a warpgroup
constexpr int kAttentionRows = 64;   // of a warpgroup
constexpr int kWarpgroupThreads = 128, kAttentionWarps = 8;
constexpr int kAttentionThreads = 3 * kWarpgroupThreads;  // the last warpgroup copies
// Registers of a thread that copies, computes; their sum must not exceed what the block is launched with.
constexpr int kCopyingRegisters = 24, kComputingRegisters = 240;

// Dimensions of a head, keys of a tile, stages of tiles in shared memory.
template <int kDims_, int kKeys_, int kStages_>
struct AttentionTile {
    static constexpr int kDims = kDims_, kKeys = kKeys_, kStages = kStages_;
    static constexpr bool kSharesRows = kDims == 2 * kAttentionDims;  // both warpgroups have the same rows
    static constexpr int kRows = kSharesRows ? kAttentionRows : 2 * kAttentionRows;
    static constexpr int kParts = kKeys / 8, kSteps = kKeys / 16;
    static constexpr int kChunks = kDims / 64, kAtomBytes = kKeys * 128, kTileBytes = kChunks * kAtomBytes;
    static constexpr int kQueryBytes = kAttentionRows * kAttentionDims * 2;  // of a warpgroup
    static constexpr int kScoreBytes = kSharesRows ? kAttentionRows * kKeys * 4 : 0;
    static constexpr int kValuesAt = 2 * kQueryBytes + kStages * kTileBytes;
    static constexpr int kScoresAt = kValuesAt + kStages * kTileBytes;
    static constexpr int kBarriersAt = kScoresAt + 2 * kScoreBytes;
    static constexpr int kBarriers = 4 * kStages + 4;
    static constexpr int kSharedBytes = kBarriersAt + kBarriers * 8;
    static_assert(kDims == kAttentionDims || kSharesRows);
    static_assert(kSharedBytes <= 227 * 1024);
};

struct AttentionArguments {
    TensorMap k, v;           // chunks of 64 dimensions of all KV heads, rows that are visible to any token
    const void* q;            // [kDims, n_heads, n_tokens], float32 or, if q_is_half, float16
    int64_t q_head, q_token;  // distances in elements
    int32_t q_is_half;
    int32_t n_tokens, group;  // group: query heads of a KV head
    int32_t n_rows;           // visible ones
    int32_t own_row, window;  // of token 0, causal attention; window 0: every token sees all rows
    int32_t n_splits;
    void* out;  // [kDims * n_heads, n_tokens] of `type`
    int64_t out_token;
    FloatType type;
    // Of more than one split: per split, row tile and warpgroup results as float16, in the order of
    // registers, and per row its maximum and sum.
    uint4* partial;
    float2* sums;
};

__device__ __forceinline__ int32_t first_visible(const AttentionArguments& a, int32_t token) {
    return a.window ? max(0, a.own_row + token - a.window + 1) : 0;
}
__device__ __forceinline__ int32_t end_visible(const AttentionArguments& a, int32_t token) {
    return a.window ? min(a.n_rows, a.own_row + token + 1) : a.n_rows;
}

// A block's tile of rows; of causal attention those with most keys are the first to begin.
__device__ __forceinline__ int32_t row_tile() { return static_cast<int32_t>(gridDim.x - 1 - blockIdx.x); }

// Tiles [begin, end) of keys that a block is to compute.
struct KeyTiles {
    int32_t begin, end;
    int32_t all_first, all_end;  // rows that are visible to all of its rows
};

template <typename T>
__device__ __forceinline__ KeyTiles key_tiles(const AttentionArguments& a) {
    const int32_t n = a.n_tokens * a.group;
    const int32_t row = row_tile() * T::kRows;
    const int32_t first_token = row / a.group;
    const int32_t last = (min(row + T::kRows, n) - 1) / a.group;
    const int32_t begin = first_visible(a, first_token) / T::kKeys;
    const int32_t end = (end_visible(a, last) + T::kKeys - 1) / T::kKeys;
    const int32_t n_tiles = max(end - begin, 0), split = static_cast<int32_t>(blockIdx.y);
    return {begin + static_cast<int32_t>(int64_t{n_tiles} * split / a.n_splits),
            begin + static_cast<int32_t>(int64_t{n_tiles} * (split + 1) / a.n_splits), first_visible(a, last),
            end_visible(a, first_token)};
}

// A warpgroup's place: thread of it, its first row among those of the KV head, its first dimension.
struct Place {
    int warpgroup, thread, lane;
    int32_t row, dim;
};

template <typename T>
__device__ __forceinline__ Place place_of_thread() {
    const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroupThreads;
    const int32_t row = row_tile() * T::kRows;
    return {warpgroup, static_cast<int>(threadIdx.x) % kWarpgroupThreads, lane_of_thread(),
            T::kSharesRows ? row : row + warpgroup * kAttentionRows,
            T::kSharesRows ? warpgroup * kAttentionDims : 0};
}

// A row's token and head.
struct QueryRow {
    int32_t token, head;
};
__device__ __forceinline__ QueryRow query_row(const AttentionArguments& a, int32_t row, int32_t kv_head) {
    const int32_t token = row / a.group;
    return {token, kv_head * a.group + row - token * a.group};
}

}  // namespace pydiffusion::cuda
