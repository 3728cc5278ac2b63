// Expert matmuls of quantized weights with many columns (a token and one of its experts each): integers and
// float16 activations are multiplied by tensor cores, with float32 sums. Columns are grouped by expert, so
// that an expert's weights are read once per tile of columns. The order of sums depends on the length of a
// row alone: a column's result is the same in any tile and beside any other columns.
#pragma once

#include <cfloat>
#include <cstdint>

#include "backend/cuda/weight_formats.cuh"

namespace pydiffusion::cuda {

// Columns that share a tile: `columns[begin ... begin + n)` with the weights of one expert.
struct ColumnTile {
    int32_t expert, begin, n;
};

struct MatmulArguments {
    const unsigned char* weights;  // [n_experts][n_rows][row_bytes]
    int64_t weights_bytes, expert_bytes;
    int32_t row_bytes, n_rows, n_chunks;  // an expert's weights and all of x take less than 2 GB
    const unsigned char* x;               // [n][n_chunks][kXChunkBytes], as to_half() writes it
    const float* x_scale;                 // [n], x's rows are to be multiplied by this
    float* y;                             // [column][n_rows]
    const int32_t* columns;               // sorted by expert; column c multiplies x's row c / share
    const ColumnTile* tiles;
    const int32_t* n_tiles;
    int32_t share;
};

namespace {  // kernels

// --- preparation of x ---

constexpr int kToHalfThreads = 256;
constexpr int kXChunkBytes = 2 * kChunk + 4 * kSixteens;

__device__ __forceinline__ float low_half(uint32_t pair) {
    return half_to_float(static_cast<uint16_t>(pair));
}
__device__ __forceinline__ float high_half(uint32_t pair) {
    return half_to_float(static_cast<uint16_t>(pair >> 16));
}

// Writes a row of x as float16 times a power of two that brings its maximum to [2^13, 2^14), so that any
// finite row fits. A chunk of the result, kXChunkBytes: the 256 values in the order in which the threads of a
// quad read them, then the sums of each 16, divided by kSumScale, as the nearest float16, then what this
// lacks. Zeros follow n_values.
__global__ void __launch_bounds__(kToHalfThreads)
    to_half(const float* x, int64_t stride, int32_t n_values, int32_t n_chunks, unsigned char* out,
            float* scales) {
    __shared__ float maxima[kToHalfThreads / 32];
    const float* row = x + blockIdx.x * stride;
    float maximum = 0.0f;
    for (int i = threadIdx.x; i < n_values; i += kToHalfThreads) maximum = fmaxf(maximum, fabsf(row[i]));
    for (int offset = 16; offset > 0; offset /= 2)
        maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = maximum;
    __syncthreads();
    for (int i = 0; i < kToHalfThreads / 32; ++i) maximum = fmaxf(maximum, maxima[i]);
    int exponent = 0;
    if (maximum > 0.0f && maximum <= FLT_MAX) frexpf(maximum, &exponent);
    exponent = exponent < -100 ? -100 : exponent;
    const float factor = ldexpf(1.0f, 14 - exponent);
    out += static_cast<int64_t>(blockIdx.x) * n_chunks * kXChunkBytes;
    // Four values a thread; kToHalfThreads is a multiple of a chunk's 64 fours, so that no warp diverges.
    for (int four = threadIdx.x; four < n_chunks * kChunk / 4; four += kToHalfThreads) {
        float v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = 4 * four + j < n_values ? row[4 * four + j] * factor : 0.0f;
        const uint2 pairs = make_uint2(half2_of(v[0], v[2]), half2_of(v[1], v[3]));
        float sum = low_half(pairs.x) + low_half(pairs.y) + (high_half(pairs.x) + high_half(pairs.y));
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        sum /= kSumScale;
        unsigned char* chunk = out + four / 64 * kXChunkBytes;
        const int in_chunk = four % 64, t = four % 4, sixteen = four / 4 % 2;
        *reinterpret_cast<uint2*>(chunk + in_chunk / 8 * 64 + 16 * t + 8 * sixteen) = pairs;
        if (t == 0) {
            const uint32_t nearest = half2_of(sum, sum);
            uint16_t* sums = reinterpret_cast<uint16_t*>(chunk + 2 * kChunk);
            sums[in_chunk / 4] = static_cast<uint16_t>(nearest);
            const float rest = sum - low_half(nearest);
            sums[kSixteens + in_chunk / 4] = static_cast<uint16_t>(half2_of(rest, rest));
        }
    }
    if (threadIdx.x == 0) scales[blockIdx.x] = ldexpf(1.0f, exponent - 14);
}

// --- columns by expert ---

constexpr int kGroupThreads = 1024, kMaxExperts = 1024;

// Sorts the columns (token, slot) by selected expert and cuts each expert's into tiles of at most `tile`. One
// block. ids [n_tokens][stride], the first n_used of each row. An id outside [0, n_experts) gets no column.
__global__ void __launch_bounds__(kGroupThreads)
    group_columns(const int32_t* ids, int64_t stride, int32_t n_used, int32_t n_tokens, int32_t n_experts,
                  int32_t tile, int32_t* columns, ColumnTile* tiles, int32_t* n_tiles) {
    __shared__ int32_t counts[kMaxExperts], next[kMaxExperts];
    __shared__ int32_t column_sums[32], tile_sums[32];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    counts[thread] = 0;
    __syncthreads();
    const int32_t n = n_tokens * n_used;
    for (int32_t c = thread; c < n; c += kGroupThreads) {
        const int32_t expert = ids[c / n_used * stride + c % n_used];
        if (static_cast<uint32_t>(expert) < static_cast<uint32_t>(n_experts)) atomicAdd(&counts[expert], 1);
    }
    __syncthreads();
    // Exclusive sums of columns and tiles over the experts.
    const int32_t own = counts[thread], own_tiles = (own + tile - 1) / tile;
    int32_t sum = own, tile_sum = own_tiles;
    for (int offset = 1; offset < 32; offset *= 2) {
        const int32_t a = __shfl_up_sync(0xffffffffu, sum, offset);
        const int32_t b = __shfl_up_sync(0xffffffffu, tile_sum, offset);
        if (lane >= offset) {
            sum += a;
            tile_sum += b;
        }
    }
    if (lane == 31) {
        column_sums[warp] = sum;
        tile_sums[warp] = tile_sum;
    }
    __syncthreads();
    for (int w = 0; w < warp; ++w) {
        sum += column_sums[w];
        tile_sum += tile_sums[w];
    }
    const int32_t first = sum - own, first_tile = tile_sum - own_tiles;
    next[thread] = first;
    if (thread == kGroupThreads - 1) *n_tiles = tile_sum;
    for (int32_t i = 0; i < own_tiles; ++i) {
        const int32_t left = own - i * tile;
        tiles[first_tile + i] = {thread, first + i * tile, left < tile ? left : tile};
    }
    __syncthreads();
    // The order within an expert is that of arrival; a column's result doesn't depend on it.
    for (int32_t c = thread; c < n; c += kGroupThreads) {
        const int32_t expert = ids[c / n_used * stride + c % n_used];
        if (static_cast<uint32_t>(expert) < static_cast<uint32_t>(n_experts))
            columns[atomicAdd(&next[expert], 1)] = c;
    }
}

// --- the matmul ---

// A tile of kWarps * 16 * kRowParts rows and 8 * kColumnParts columns, in kStages stages of one chunk.
template <typename Format, int kWarps_, int kRowParts_, int kColumnParts_, int kStages_>
struct Tile {
    static constexpr int kWarps = kWarps_, kRowParts = kRowParts_, kColumnParts = kColumnParts_,
                         kStages = kStages_;
    static constexpr int kThreads = 32 * kWarps, kWarpRows = 16 * kRowParts, kRows = kWarps * kWarpRows;
    static constexpr int kColumns = 8 * kColumnParts;
    static constexpr int kColumnPitch =
        kXChunkBytes;  // an odd multiple of 64 bytes, which avoids bank conflicts
    static constexpr int kWeightBytes = kRows * Format::kPitch, kXBytes = kColumns * kColumnPitch;
    static constexpr int kStageBytes = kWeightBytes + kXBytes;
    static constexpr int kTableBytes = kRows * static_cast<int>(sizeof(Table<Format::kScales>));
    static constexpr int kSharedBytes = kStages * kStageBytes + kTableBytes + 8 * kColumns;
};

// What a block works on, and its shared memory.
template <typename Format, typename T>
struct Block {
    const MatmulArguments& a;
    const unsigned char* weights;  // the expert's
    int32_t first_row, n;          // n columns
    unsigned char* stages;
    Table<Format::kScales>* tables;
    int32_t* x_offsets;  // per column: where x's row begins
    int32_t* columns;

    __device__ __forceinline__ unsigned char* stage(int chunk) const {
        return stages + chunk % T::kStages * T::kStageBytes;
    }

    __device__ __forceinline__ int32_t
    row_offset(int row) const {  // of a row of the tile, in the expert's weights
        const int32_t last = a.n_rows - 1, r = first_row + row;
        return (r < last ? r : last) * a.row_bytes;
    }

    // Bytes between a chunk, which begins at `offset`, and the multiple of 16 below it, where its copy
    // begins.
    __device__ __forceinline__ int shift(int32_t offset) const {
        return Format::kAligned ? 0 : (static_cast<int>(weights - a.weights) + offset) & 15;
    }
};

// A thread's share of the copies to shared memory. Each warp copies the weights that it multiplies.
template <typename Format, typename T>
struct Copies {
    static constexpr int kPieces = Format::kPitch / 16, kPerLane = (T::kWarpRows * kPieces + 31) / 32;
    static_assert(kPieces * 16 == Format::kPitch &&
                  Format::kPitch >= Format::kChunkBytes + (Format::kAligned ? 0 : 14));

    const Block<Format, T>& block;
    int32_t offsets[kPerLane];  // of the rows of this lane's pieces
    int64_t left;               // bytes from the expert's first weight to the end of the tensor

    __device__ __forceinline__ explicit Copies(const Block<Format, T>& b) : block(b) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
            offsets[i] = block.row_offset(warp * T::kWarpRows + (lane + 32 * i) / kPieces);
        left = block.a.weights_bytes - (block.weights - block.a.weights);
    }

    __device__ __forceinline__ void weights(int chunk) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        unsigned char* target = block.stage(chunk) + warp * T::kWarpRows * Format::kPitch + 16 * lane;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            if (lane + 32 * i >= T::kWarpRows * kPieces) break;
            const int32_t begin = offsets[i] + chunk * Format::kChunkBytes;
            const int32_t from = begin - block.shift(begin) + (lane + 32 * i) % kPieces * 16;
            int n_bytes = 16;
            if (!Format::kAligned && left - from < 16) {  // the tensor's last piece, or one after it
                n_bytes = left > from ? static_cast<int>(left - from) : 0;
            }
            copy_async_16(target + 512 * i, n_bytes > 0 ? block.weights + from : block.a.weights, n_bytes);
        }
    }

    __device__ __forceinline__ void x(int chunk) const {
        constexpr int kXPieces = kXChunkBytes / 16;
        unsigned char* target = block.stage(chunk) + T::kWeightBytes;
        const unsigned char* from = block.a.x + chunk * kXChunkBytes;
        for (int i = threadIdx.x; i < block.n * kXPieces; i += T::kThreads)
            copy_async_16(target + 16 * i, from + block.x_offsets[i / kXPieces] + i % kXPieces * 16, 16);
    }
};

// For a fragment of [16, 8]: the first two values are of row g, the others of row g + 8.
__device__ __forceinline__ void add_scaled(float (&sums)[4], float low, float high,
                                           const float (&products)[4]) {
    sums[0] += low * products[0];
    sums[1] += low * products[1];
    sums[2] += high * products[2];
    sums[3] += high * products[3];
}

// Adds the products of a chunk's zeros: sums += factor * a * (sums of x), [16, 16] times [16, 8] twice.
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
                reinterpret_cast<const uint32_t*>(x + (8 * part + g) * T::kColumnPitch + 2 * kChunk);
            float products[4];
            product_16x8x16(products, a, {b[t], b[t + 4]});
            mma_16x8x16(products, a, {b[t + 8], b[t + 12]});
            add_scaled(sums[i][part], low.factor, high.factor, products);
        }
    }
}

// Adds the products of a unit of 64 weights.
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
        float2 scales[T::kRowParts]
                     [2];  // [row part][row g or g + 8], of the unit's groups or the group's sixteens
#pragma unroll
        for (int i = 0; i < T::kRowParts; ++i) {
            const int at = kPerSixteen ? first / 16 : 2 * unit;
            scales[i][0] = *reinterpret_cast<const float2*>(table[16 * i + g].scales + at);
            scales[i][1] = *reinterpret_cast<const float2*>(table[16 * i + 8 + g].scales + at);
        }
#pragma unroll
        for (int part = 0; part < n_parts; ++part) {
            const uint4 b =
                *reinterpret_cast<const uint4*>(x + (8 * part + g) * T::kColumnPitch + 2 * first + 16 * t);
#pragma unroll
            for (int i = 0; i < T::kRowParts; ++i) {
                const auto& low = q[i][0][group];
                const auto& high = q[i][1][group];
                const float2 s[2] = {scales[i][0], scales[i][1]};
                float products[4];
                product_16x8x16(products, {low[0][0], high[0][0], low[0][1], high[0][1]}, {b.x, b.y});
                if constexpr (kPerSixteen) {
                    add_scaled(sums[i][part], s[0].x, s[1].x, products);
                    product_16x8x16(products, {low[1][0], high[1][0], low[1][1], high[1][1]}, {b.z, b.w});
                    add_scaled(sums[i][part], s[0].y, s[1].y, products);
                } else {
                    mma_16x8x16(products, {low[1][0], high[1][0], low[1][1], high[1][1]}, {b.z, b.w});
                    add_scaled(sums[i][part], group == 0 ? s[0].x : s[0].y, group == 0 ? s[1].x : s[1].y,
                               products);
                }
            }
        }
    }
}

// Multiplies the tile with n_parts parts of 8 columns, and writes y.
template <int n_parts, typename Format, typename T>
__device__ __forceinline__ void multiply(const Block<Format, T>& block) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int warp_row = warp * T::kWarpRows;
    Table<Format::kScales>* table = block.tables + warp_row;
    float sums[T::kRowParts][n_parts][4] = {};
    const int n_chunks = block.a.n_chunks;
    const Copies<Format, T> copy(block);
    for (int chunk = 0; chunk < T::kStages - 1; ++chunk) {
        if (chunk < n_chunks) {
            copy.weights(chunk);
            copy.x(chunk);
        }
        copy_async_commit();
    }
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
        copy_async_wait<T::kStages - 2>();
        __syncthreads();  // the chunk has arrived for all; the stage before it and the tables are free
        if (chunk + T::kStages - 1 < n_chunks) {
            copy.weights(chunk + T::kStages - 1);
            copy.x(chunk + T::kStages - 1);
        }
        copy_async_commit();
        const unsigned char* weights = block.stage(chunk) + warp_row * Format::kPitch;
        const unsigned char* x = block.stage(chunk) + T::kWeightBytes;
#pragma unroll
        for (int i = lane; i < 2 * T::kWarpRows; i += 32) {
            const int row = i / 2;
            const int32_t offset = block.row_offset(warp_row + row) + chunk * Format::kChunkBytes;
            Format::decode(Bytes<Format::kAligned>(weights + row * Format::kPitch, block.shift(offset)),
                           i % 2, table[row]);
        }
        __syncwarp();
        Bytes<Format::kAligned> bytes[T::kRowParts][2];  // of rows g and g + 8 of each row part
#pragma unroll
        for (int i = 0; i < T::kRowParts; ++i) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int row = 16 * i + 8 * j + g;
                const int32_t offset = block.row_offset(warp_row + row) + chunk * Format::kChunkBytes;
                bytes[i][j] = {weights + row * Format::kPitch + 4 * t, block.shift(offset)};
            }
        }
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) add_unit<n_parts, Format, T>(sums, unit, bytes, table, x);
        add_zeros<n_parts, Format, T>(sums, table, x);
    }
#pragma unroll
    for (int part = 0; part < n_parts; ++part) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int column = 8 * part + 2 * t + j;
            if (column >= block.n) continue;
            const float scale = block.a.x_scale[block.columns[column] / block.a.share];
            float* y = block.a.y + static_cast<int64_t>(block.columns[column]) * block.a.n_rows;
#pragma unroll
            for (int i = 0; i < T::kRowParts; ++i) {
                const int row = block.first_row + warp_row + 16 * i + g;
                if (row < block.a.n_rows) y[row] = sums[i][part][j] * scale;
                if (row + 8 < block.a.n_rows) y[row + 8] = sums[i][part][2 + j] * scale;
            }
        }
    }
}

// Calls multiply() with as few parts as the block's columns need.
template <int n_parts, typename Format, typename T>
__device__ __forceinline__ void multiply_parts(const Block<Format, T>& block) {
    if constexpr (n_parts > 1) {
        if (block.n <= 8 * (n_parts - 1)) return multiply_parts<n_parts - 1>(block);
    }
    multiply<n_parts>(block);
}

// grid: (tiles of rows, at least as many tiles of columns as there are)
template <typename Format, typename T>
__global__ void __launch_bounds__(T::kThreads) expert_matmul(const MatmulArguments a) {
    if (static_cast<int32_t>(blockIdx.y) >= *a.n_tiles) return;
    const ColumnTile tile = a.tiles[blockIdx.y];
    unsigned char* shared = dynamic_shared();
    unsigned char* tables = shared + T::kStages * T::kStageBytes;
    int32_t* offsets = reinterpret_cast<int32_t*>(tables + T::kTableBytes);
    Block<Format, T> block = {a,
                              a.weights + tile.expert * a.expert_bytes,
                              static_cast<int32_t>(blockIdx.x) * T::kRows,
                              tile.n,
                              shared,
                              reinterpret_cast<Table<Format::kScales>*>(tables),
                              offsets,
                              offsets + T::kColumns};
    for (int c = threadIdx.x; c < tile.n; c += T::kThreads) {
        const int32_t column = a.columns[tile.begin + c];
        block.x_offsets[c] = column / a.share * a.n_chunks * kXChunkBytes;
        block.columns[c] = column;
    }
    __syncthreads();
    multiply_parts<T::kColumnParts>(block);
}

}  // namespace

}  // namespace pydiffusion::cuda
