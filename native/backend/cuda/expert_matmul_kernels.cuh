// Expert matmuls of quantized weights with many slots (a token and one of its experts each): integers and
// float16 activations are multiplied by tensor cores, with float32 sums. Slots are grouped by expert, so
// that an expert's weights are read once per tile of slots. The order of sums depends on the length of a
// row alone: a slot's result is the same in any tile and beside any other slots.
#pragma once

#include <cstdint>

#include "backend/cuda/expert_slots.cuh"
#include "backend/cuda/weight_formats.cuh"

namespace pydiffusion::cuda {

struct MatmulArguments {
    const unsigned char* weights;  // [n_experts][n_rows][row_bytes]
    int64_t weights_bytes, expert_bytes;
    int32_t row_bytes, n_rows, n_values, n_chunks;  // an expert's weights and all of x take less than 2 GB
    int32_t n_row_tiles;                            // that a block computes
    const unsigned char* x;                         // [n][n_chunks][kXChunkBytes], as pack_rows() writes it
    const float* x_scale;                           // [n], x's rows are to be multiplied by this
    float* y;                                       // [slot][n_rows]
    const int32_t* slots;                           // sorted by expert; slot s multiplies x's row s / share
    const SlotTile* tiles;
    const int32_t* n_tiles;
    int32_t share;
};

namespace {  // kernels

// A tile of kWarps * 16 * kRowParts rows and 8 * kSlotParts slots, in kStages stages of one chunk.
template <typename Format, int kWarps_, int kRowParts_, int kSlotParts_, int kStages_>
struct Tile {
    static constexpr int kWarps = kWarps_, kRowParts = kRowParts_, kSlotParts = kSlotParts_;
    static constexpr int kStages = kStages_, kThreads = 32 * kWarps;
    static constexpr int kWarpRows = 16 * kRowParts, kRows = kWarps * kWarpRows, kSlots = 8 * kSlotParts;
    // Slots are an odd multiple of 64 bytes apart, which avoids bank conflicts.
    static constexpr int kWeightBytes = kRows * Format::kPitch, kXBytes = kSlots * kXChunkBytes;
    static constexpr int kStageBytes = kWeightBytes + kXBytes;
    static constexpr int kTableBytes = kRows * static_cast<int>(sizeof(Table<Format::kScales>));
    static constexpr int kSharedBytes = kStages * kStageBytes + kTableBytes + 4 * kSlots;
    // Blocks that a Hopper multiprocessor's shared memory (228 KB, 1 of a block CUDA's own) has room for;
    // registers are limited so that they have room too.
    static constexpr int kBlocks = 228 * 1024 / (kSharedBytes + 1024);
};

// How a matmul is launched: grid (n_row_blocks, n_tiles), where n_tiles is the most that group_slots() can
// make.
struct Launch {
    int64_t n_row_tiles, n_row_blocks, n_tiles;
};

constexpr int64_t kMinChunks = 6;  // of a block: it copies the next chunk while it computes

template <typename T>
Launch launch_of(int64_t n_rows, int64_t n_chunks, int64_t n_experts, int64_t n_slots) {
    const int64_t n_row_tiles = n_chunks < kMinChunks ? kMinChunks / n_chunks : 1;
    const int64_t block_rows = n_row_tiles * T::kRows;
    return {n_row_tiles, (n_rows + block_rows - 1) / block_rows, n_experts + n_slots / T::kSlots};
}

// Operands and shared memory of a block.
template <typename Format, typename T>
struct Block {
    const MatmulArguments& a;
    const unsigned char* weights;  // the expert's
    int32_t n;                     // slots
    unsigned char* stages;
    Table<Format::kScales>* tables;
    int32_t* slots;

    // Where a row begins in the expert's weights; rows that fill the last tile repeat the last one.
    __device__ __forceinline__ int32_t row_offset(int32_t row) const {
        return (row < a.n_rows ? row : a.n_rows - 1) * a.row_bytes;
    }

    // Bytes between a chunk, which begins at `offset`, and the multiple of 16 below it, where its copy
    // begins.
    __device__ __forceinline__ int shift(int32_t offset) const {
        return Format::kAligned ? 0 : static_cast<int>((weights - a.weights + offset) & 15);
    }
};

// A chunk of a tile of rows, and its stage in shared memory.
template <typename T>
struct Position {
    int32_t first_row, chunk = 0, stage = 0;

    __device__ __forceinline__ void advance(int32_t n_chunks) {
        if (++chunk == n_chunks) {
            chunk = 0;
            first_row += T::kRows;
        }
        if (++stage == T::kStages) stage = 0;
    }
};

// A thread's share of the copies to shared memory, one chunk after the other. Each warp copies the weights
// that it multiplies.
template <int n_parts, typename Format, typename T>
struct Copies {
    static constexpr int kPieces = Format::kPitch / 16, kPerLane = (T::kWarpRows * kPieces + 31) / 32;
    static constexpr int kXPieces = kXChunkBytes / 16;
    static constexpr int kXPerThread = (8 * n_parts * kXPieces + T::kThreads - 1) / T::kThreads;
    static_assert(kPieces * 16 == Format::kPitch &&
                  Format::kPitch >= Format::kChunkBytes + (Format::kAligned ? 0 : 14));

    const Block<Format, T>& block;
    Position<T> at;
    int32_t offsets[kPerLane];       // of the rows of this lane's pieces
    int32_t x_offsets[kXPerThread];  // of this thread's pieces of x; -1: none
    int64_t left;                    // bytes from the expert's first weight to the end of the tensor

    __device__ __forceinline__ Copies(const Block<Format, T>& b, int32_t first_row)
        : block(b), at{first_row} {
        set_rows();
#pragma unroll
        for (int i = 0; i < kXPerThread; ++i) {
            const int piece = threadIdx.x + i * T::kThreads, slot = piece / kXPieces;
            x_offsets[i] = -1;
            if (slot < block.n) {
                const int32_t row = block.slots[slot] / block.a.share;
                x_offsets[i] = row * block.a.n_chunks * kXChunkBytes + piece % kXPieces * 16;
            }
        }
        left = block.a.weights_bytes - (block.weights - block.a.weights);
    }

    __device__ __forceinline__ void set_rows() {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const int piece = lane + 32 * i;
            offsets[i] = block.row_offset(at.first_row + warp * T::kWarpRows + piece / kPieces);
            if (Format::kAligned) offsets[i] += piece % kPieces * 16;
        }
    }

    __device__ __forceinline__ void copy_weights(unsigned char* stage) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        unsigned char* target = stage + warp * T::kWarpRows * Format::kPitch + 16 * lane;
        const unsigned char* weights = block.weights + at.chunk * Format::kChunkBytes;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            if (lane + 32 * i >= T::kWarpRows * kPieces) break;
            if (Format::kAligned) {
                copy_async_16(target + 512 * i, weights + offsets[i], 16);
                continue;
            }
            const int32_t begin = offsets[i] + at.chunk * Format::kChunkBytes;
            const int32_t from = begin - block.shift(begin) + (lane + 32 * i) % kPieces * 16;
            // Nothing is read after the tensor: its last piece may be shorter.
            const int n_bytes = left - from >= 16 ? 16 : left > from ? static_cast<int>(left - from) : 0;
            copy_async_16(target + 512 * i, n_bytes > 0 ? block.weights + from : block.a.weights, n_bytes);
        }
    }

    __device__ __forceinline__ void copy_next() {
        unsigned char* stage = block.stages + at.stage * T::kStageBytes;
        copy_weights(stage);
        const unsigned char* x = block.a.x + at.chunk * kXChunkBytes;
        unsigned char* target = stage + T::kWeightBytes + 16 * threadIdx.x;
#pragma unroll
        for (int i = 0; i < kXPerThread; ++i) {
            if (x_offsets[i] >= 0) copy_async_16(target + 16 * T::kThreads * i, x + x_offsets[i], 16);
        }
        at.advance(block.a.n_chunks);
        if (at.chunk == 0) set_rows();
    }
};

// Adds the part of a chunk's zeros: sums += factor * a * (sums of x), [16, 16] times [16, 8] twice.
template <int n_parts, typename Format, typename T>
__device__ __forceinline__ void add_zeros(float (&sums)[T::kRowParts][n_parts][4],
                                          const Table<Format::kScales>* table, const unsigned char* x) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < T::kRowParts; ++i) {
        const Table<Format::kScales>&low = table[16 * i + g], &high = table[16 * i + 8 + g];
        const uint32_t a[4] = {low.a[t], high.a[t], low.a[t + 4], high.a[t + 4]};
#pragma unroll
        for (int part = 0; part < n_parts; ++part) {
            const uint32_t* b =
                reinterpret_cast<const uint32_t*>(x + (8 * part + g) * kXChunkBytes + 2 * kChunk);
            float partial[4];
            multiply_16x8x16(partial, a, {b[t], b[t + 4]});
            mma_16x8x16(partial, a, {b[t + 8], b[t + 12]});
            add_scaled(sums[i][part], low.factor, high.factor, partial);
        }
    }
}

// Adds the part of a unit of 64 weights.
template <int n_parts, typename Format, typename T>
__device__ __forceinline__ void add_unit(float (&sums)[T::kRowParts][n_parts][4], int unit,
                                         const Bytes<Format::kAligned> (&weights)[T::kRowParts][2],
                                         const Table<Format::kScales>* table, const unsigned char* x) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    constexpr bool kPerSixteen = Format::kScales == kSixteens;
    uint32_t q[T::kRowParts][2][2][2][2];  // [row part][row g or g + 8][group][sixteen][pair]
#pragma unroll
    for (int i = 0; i < T::kRowParts; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) Format::unpack(weights[i][j], unit, q[i][j]);
    }
#pragma unroll
    for (int group = 0; group < 2; ++group) {
        const int first = Format::group_begin(unit, group);
        // [row part][row g or g + 8], of the unit's groups or the group's sixteens
        float2 scales[T::kRowParts][2];
#pragma unroll
        for (int i = 0; i < T::kRowParts; ++i) {
            const int at = kPerSixteen ? first / 16 : 2 * unit;
            scales[i][0] = *reinterpret_cast<const float2*>(table[16 * i + g].scales + at);
            scales[i][1] = *reinterpret_cast<const float2*>(table[16 * i + 8 + g].scales + at);
        }
#pragma unroll
        for (int part = 0; part < n_parts; ++part) {
            const uint4 b =
                *reinterpret_cast<const uint4*>(x + (8 * part + g) * kXChunkBytes + 2 * first + 16 * t);
#pragma unroll
            for (int i = 0; i < T::kRowParts; ++i) {
                const auto& low = q[i][0][group];
                const auto& high = q[i][1][group];
                const float2 s[2] = {scales[i][0], scales[i][1]};
                float partial[4];
                multiply_16x8x16(partial, {low[0][0], high[0][0], low[0][1], high[0][1]}, {b.x, b.y});
                if constexpr (kPerSixteen) {
                    add_scaled(sums[i][part], s[0].x, s[1].x, partial);
                    multiply_16x8x16(partial, {low[1][0], high[1][0], low[1][1], high[1][1]}, {b.z, b.w});
                    add_scaled(sums[i][part], s[0].y, s[1].y, partial);
                } else {
                    mma_16x8x16(partial, {low[1][0], high[1][0], low[1][1], high[1][1]}, {b.z, b.w});
                    add_scaled(sums[i][part], group == 0 ? s[0].x : s[0].y, group == 0 ? s[1].x : s[1].y,
                               partial);
                }
            }
        }
    }
}

// Adds the part of the chunk at a position.
template <int n_parts, typename Format, typename T>
__device__ __forceinline__ void add_chunk(float (&sums)[T::kRowParts][n_parts][4],
                                          const Block<Format, T>& block, const Position<T>& at) {
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * T::kWarpRows, g = lane / 4, t = lane % 4;
    const unsigned char* stage = block.stages + at.stage * T::kStageBytes;
    Table<Format::kScales>* table = block.tables + warp_row;
    const int n_left = block.a.n_values - at.chunk * kChunk;
    const auto bytes_of = [&](int row, int skipped) {
        const int32_t offset =
            block.row_offset(at.first_row + warp_row + row) + at.chunk * Format::kChunkBytes;
        return Bytes<Format::kAligned>(stage + (warp_row + row) * Format::kPitch + skipped,
                                       block.shift(offset));
    };
#pragma unroll
    for (int i = lane; i < 2 * T::kWarpRows; i += 32)
        Format::decode(bytes_of(i / 2, 0), i % 2, n_left, table[i / 2]);
    __syncwarp();
    Bytes<Format::kAligned> bytes[T::kRowParts][2];  // of rows g and g + 8 of each row part
#pragma unroll
    for (int i = 0; i < T::kRowParts; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) bytes[i][j] = bytes_of(16 * i + 8 * j + g, 4 * t);
    }
    const unsigned char* x = stage + T::kWeightBytes;
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) add_unit<n_parts, Format, T>(sums, unit, bytes, table, x);
    add_zeros<n_parts, Format, T>(sums, table, x);
}

// Writes a tile's results to y, and sets the sums to zero.
template <int n_parts, typename Format, typename T>
__device__ __forceinline__ void write_tile(float (&sums)[T::kRowParts][n_parts][4],
                                           const Block<Format, T>& block, int32_t first_row) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    first_row += threadIdx.x / 32 * T::kWarpRows + g;
#pragma unroll
    for (int part = 0; part < n_parts; ++part) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int slot = 8 * part + 2 * t + j;
            const bool is_slot = slot < block.n;
            const int32_t c = is_slot ? block.slots[slot] : 0;
            const float scale = block.a.x_scale[c / block.a.share];
            float* y = block.a.y + static_cast<int64_t>(c) * block.a.n_rows;
#pragma unroll
            for (int i = 0; i < T::kRowParts; ++i) {
                const int32_t row = first_row + 16 * i;
                if (is_slot && row < block.a.n_rows) y[row] = sums[i][part][j] * scale;
                if (is_slot && row + 8 < block.a.n_rows) y[row + 8] = sums[i][part][2 + j] * scale;
                sums[i][part][j] = sums[i][part][2 + j] = 0.0f;
            }
        }
    }
}

// Multiplies the block's tiles with n_parts parts of 8 slots.
template <int n_parts, typename Format, typename T>
__device__ __forceinline__ void multiply(const Block<Format, T>& block) {
    const int32_t n_chunks = block.a.n_chunks, first_row = blockIdx.x * block.a.n_row_tiles * T::kRows;
    const int32_t all_tiles = (block.a.n_rows - first_row + T::kRows - 1) / T::kRows;
    const int32_t n_steps = (all_tiles < block.a.n_row_tiles ? all_tiles : block.a.n_row_tiles) * n_chunks;
    float sums[T::kRowParts][n_parts][4] = {};
    Copies<n_parts, Format, T> copies(block, first_row);
    for (int step = 0; step < T::kStages - 1; ++step) {
        if (step < n_steps) copies.copy_next();
        copy_async_commit();
    }
    Position<T> at{first_row};
    for (int step = 0; step < n_steps; ++step) {
        copy_async_wait<T::kStages - 2>();
        __syncthreads();  // the chunk has arrived for all; the stage before it and the tables are free
        if (step + T::kStages - 1 < n_steps) copies.copy_next();
        copy_async_commit();
        add_chunk<n_parts>(sums, block, at);
        if (at.chunk == n_chunks - 1) write_tile<n_parts>(sums, block, at.first_row);
        at.advance(n_chunks);
    }
}

// Calls multiply() with as few parts as the block's slots need.
template <int n_parts, typename Format, typename T>
__device__ __forceinline__ void multiply_parts(const Block<Format, T>& block) {
    if constexpr (n_parts > 1) {
        if (block.n <= 8 * (n_parts - 1)) return multiply_parts<n_parts - 1>(block);
    }
    multiply<n_parts>(block);
}

// See Launch.
template <typename Format, typename T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks) expert_matmul(const MatmulArguments a) {
    await_previous_kernel();
    if (static_cast<int32_t>(blockIdx.y) >= *a.n_tiles) return;
    const SlotTile tile = a.tiles[blockIdx.y];
    unsigned char* shared = dynamic_shared();
    unsigned char* tables = shared + T::kStages * T::kStageBytes;
    const Block<Format, T> block = {a,
                                    a.weights + tile.expert * a.expert_bytes,
                                    tile.n,
                                    shared,
                                    reinterpret_cast<Table<Format::kScales>*>(tables),
                                    reinterpret_cast<int32_t*>(tables + T::kTableBytes)};
    for (int c = threadIdx.x; c < tile.n; c += T::kThreads) block.slots[c] = a.slots[tile.begin + c];
    __syncthreads();
    multiply_parts<T::kSlotParts>(block);
}

}  // namespace

}  // namespace pydiffusion::cuda
