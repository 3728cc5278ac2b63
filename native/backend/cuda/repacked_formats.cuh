// Repacked weights (backend/repacked_weights.h) as operands of repacked_matmul_kernels.cuh: in registers they
// become float16, scale * (q - zero) * 2^-24, rounded to 11 bits if need be. What is common to a row's chunk,
// and 2^24, multiplies its float32 sums.
//
// Integers q become the subnormal float16 q * 2^-24 without conversion: their bits are those of q. Chunks and
// units are those of weight_formats.cuh; a unit is 4 steps of 16 weights.
#pragma once

#include <cstdint>

#include "backend/cuda/expert_slots.cuh"
#include "backend/cuda/hopper.cuh"
#include "backend/cuda/weight_formats.cuh"

namespace pydiffusion::cuda {

// A group's chunk ("piece") in shared memory.
struct Piece {
    const unsigned char* bytes;
    int n_blocks;  // of 32 values, in a row: 8, or fewer where rows end
};

// Each format has:
//   kPieceBytes   of a whole piece
//   kWordUnits    how many units a lane's Words hold
//   kZeros        whether zeros are not in the operands, but multiply the sums of x
//   n_blocks(n_left)   of a piece that begins where n_left values of a row are left
//   load(piece, quarter, i, words)   a lane's share of rows g and g + 8 of 16 rows: the i-th Words
//   load_head(piece, quarter, head)  of these rows, as it is in memory
//   decode(head, j)    the Row of row g + 8 j
//   unpack(words, rows, unit, a)     the unit's operands, [step][fragment]
//   factor(row)        of float32 sums
//   zeros(low, high, a), zero_factor(row)   if kZeros, the same for the sums of x

struct RepackedQ4K {  // a 6-bit scale times a nibble is exact in float16
    static constexpr int kPieceBytes = 64 * Q4K::kChunkBytes, kWordUnits = 1;
    static constexpr bool kZeros = true;

    struct Words {
        uint4 w;
    };
    struct Head {
        uint4 of[2];
    };
    struct Row {
        uint32_t scales[2], minima[2], d;  // bytes; d and dmin
    };

    __device__ static __forceinline__ int n_blocks(int) { return 8; }

    __device__ static __forceinline__ void load(const Piece& piece, int quarter, int i, Words& words) {
        const unsigned char* from = piece.bytes + 2048 * quarter + 512 * i + 16 * (threadIdx.x % 32);
        words.w = *reinterpret_cast<const uint4*>(from);
    }

    __device__ static __forceinline__ void load_head(const Piece& piece, int quarter, Head& head) {
        const unsigned char* from = piece.bytes + 8192 + 256 * quarter + threadIdx.x % 32 / 4 * 16;
        head.of[0] = *reinterpret_cast<const uint4*>(from);
        head.of[1] = *reinterpret_cast<const uint4*>(from + 128);
    }

    __device__ static __forceinline__ Row decode(const Head& heads, int j) {
        const uint4& head = heads.of[j];
        Row row;
        row.d = head.x;
        row.scales[0] = head.y & 0x3f3f3f3f;
        row.minima[0] = head.z & 0x3f3f3f3f;
        row.scales[1] = (head.w & 0x0f0f0f0f) | ((head.y >> 2) & 0x30303030);
        row.minima[1] = ((head.w >> 4) & 0x0f0f0f0f) | ((head.z >> 2) & 0x30303030);
        return row;
    }

    __device__ static __forceinline__ float factor(const Row& row) {
        return half_to_float(static_cast<uint16_t>(row.d)) * kSubnormal;
    }
    __device__ static __forceinline__ float zero_factor(const Row& row) {
        return half_to_float(static_cast<uint16_t>(row.d >> 16)) * -kSubnormal;
    }

    // Each minimum twice, for both sixteens of its group.
    __device__ static __forceinline__ void zeros(const Row& low, const Row& high, uint32_t (&a)[4]) {
        const uint32_t selector = 0x4040 + (threadIdx.x % 4) * 0x0101;
        a[0] = byte_permute(low.minima[0], 0, selector);
        a[1] = byte_permute(high.minima[0], 0, selector);
        a[2] = byte_permute(low.minima[1], 0, selector);
        a[3] = byte_permute(high.minima[1], 0, selector);
    }

    __device__ static __forceinline__ void unpack(const Words& words, const Row (&rows)[2], int unit,
                                                  uint32_t (&a)[4][4]) {
        const uint32_t w[2][2] = {{words.w.x, words.w.y}, {words.w.z, words.w.w}};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint32_t s = rows[j].scales[unit / 2];
            // The float16 0x6400 | s is 1024 + s.
            const uint32_t even_bits = byte_permute(s, 0x64646464, unit % 2 == 0 ? 0x4040 : 0x4242);
            const uint32_t odd_bits = byte_permute(s, 0x64646464, unit % 2 == 0 ? 0x4141 : 0x4343);
            const uint32_t even = half2_add(even_bits, 0xe400e400);
            const uint32_t odd = half2_fma(odd_bits, 0x2c002c00, 0xd400d400);  // s / 16: of the upper nibbles
#pragma unroll
            for (int sixteen = 0; sixteen < 2; ++sixteen) {
#pragma unroll
                for (int pair = 0; pair < 2; ++pair) {
                    const uint32_t word = w[j][sixteen] >> (8 * pair);
                    a[sixteen][2 * pair + j] = half2_mul(word & 0x000f000f, even);
                    a[2 + sixteen][2 * pair + j] = half2_mul(word & 0x00f000f0, odd);
                }
            }
        }
    }
};

struct RepackedQ6K {
    static constexpr int kPieceBytes = 64 * Q6K::kChunkBytes, kWordUnits = 2;
    static constexpr bool kZeros = false;

    struct Words {
        uint4 low[2], high;
    };
    struct Head {
        uint4 of[2];
        uint32_t d[2];
    };
    struct Row {
        uint32_t scales[4];  // bytes, 128 added
        uint32_t d;
    };

    __device__ static __forceinline__ int n_blocks(int) { return 8; }

    __device__ static __forceinline__ void load(const Piece& piece, int quarter, int i, Words& words) {
        const unsigned char* from = piece.bytes + 3072 * quarter + 1536 * i + 16 * (threadIdx.x % 32);
        words.low[0] = *reinterpret_cast<const uint4*>(from);
        words.low[1] = *reinterpret_cast<const uint4*>(from + 512);
        words.high = *reinterpret_cast<const uint4*>(from + 1024);
    }

    __device__ static __forceinline__ void load_head(const Piece& piece, int quarter, Head& head) {
        const int row = 16 * quarter + threadIdx.x % 32 / 4;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            head.of[j] = *reinterpret_cast<const uint4*>(piece.bytes + 12288 + 16 * row + 128 * j);
            head.d[j] = *reinterpret_cast<const uint16_t*>(piece.bytes + 13312 + 2 * row + 16 * j);
        }
    }

    __device__ static __forceinline__ Row decode(const Head& head, int j) {
        const uint4& s = head.of[j];
        return {{s.x ^ 0x80808080, s.y ^ 0x80808080, s.z ^ 0x80808080, s.w ^ 0x80808080}, head.d[j]};
    }

    __device__ static __forceinline__ float factor(const Row& row) {
        return half_to_float(static_cast<uint16_t>(row.d)) * kSubnormal;
    }

    __device__ static __forceinline__ void unpack(const Words& words, const Row (&rows)[2], int unit,
                                                  uint32_t (&a)[4][4]) {
        const int upper = unit % 2;  // nibbles
        const uint32_t high[2][2] = {{words.high.x, words.high.y}, {words.high.z, words.high.w}};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint32_t low[4] = {words.low[j].x, words.low[j].y, words.low[j].z, words.low[j].w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int shift = 2 * (2 * upper + i / 2);  // of the two high bits
                const uint32_t bits =
                    shift < 4 ? high[j][i % 2] << (4 - shift) : high[j][i % 2] >> (shift - 4);
                // Two of the high bits too many: one instruction merges, the masks below drop them for
                // nothing.
                const uint32_t bytes = ((low[i] >> (4 * upper)) & 0x0f0f0f0f) | (bits & 0xf0f0f0f0);
                const uint32_t scale = byte_permute(rows[j].scales[unit], 0x64646464, 0x4040 + 0x0101 * i);
                const uint32_t s = half2_add(scale, 0xe480e480);  // 1024 + 128 + scale, less 1152
                const uint32_t zero = half2_mul(s, 0x80208020);   // -32 * 2^-24
                a[i][j] = half2_fma(bytes & 0x003f003f, s, zero);
                a[i][2 + j] = half2_fma((bytes >> 8) & 0x003f003f, s, zero);
            }
        }
    }
};

struct RepackedQ80 {
    static constexpr int kPieceBytes = 64 * Q80::kChunkBytes, kWordUnits = 1;
    static constexpr bool kZeros = false;

    struct Words {
        uint4 w[2];  // of two blocks
    };
    struct Head {
        uint4 of[2];
    };
    struct Row {
        uint32_t scales[4];  // pairs
        float power;         // by which they have been divided, times kSubnormal
    };

    __device__ static __forceinline__ int n_blocks(int n_left) {
        return n_left < kChunk ? n_left / kBlockWeights : kChunk / kBlockWeights;
    }

    // Of blocks that don't exist it reads other bytes of the piece's memory: any do, for their scales are 0.
    __device__ static __forceinline__ void load(const Piece& piece, int quarter, int i, Words& words) {
        const unsigned char* from =
            piece.bytes + 512 * piece.n_blocks * quarter + 1024 * i + 16 * (threadIdx.x % 32);
        words.w[0] = *reinterpret_cast<const uint4*>(from);
        words.w[1] = *reinterpret_cast<const uint4*>(from + 512);
    }

    __device__ static __forceinline__ void load_head(const Piece& piece, int quarter, Head& head) {
        const int n = piece.n_blocks, row = 16 * quarter + static_cast<int>(threadIdx.x) % 32 / 4;
        const unsigned char* from = piece.bytes + 2048 * n + 2 * n * row;
#pragma unroll
        for (int j = 0; j < 2; ++j, from += 16 * n) {
            if (n == 8) {
                head.of[j] = *reinterpret_cast<const uint4*>(from);
                continue;
            }
            uint32_t s[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) s[i] = i < n ? *reinterpret_cast<const uint16_t*>(from + 2 * i) : 0;
            head.of[j] =
                make_uint4(s[0] | s[1] << 16, s[2] | s[3] << 16, s[4] | s[5] << 16, s[6] | s[7] << 16);
        }
    }

    // Scales are multiplied by the power of two that scales the chunk's largest, if it is not subnormal, to
    // [2^14, 2^15), so that scale times q * 2^-24 is precise.
    __device__ static __forceinline__ Row decode(const Head& head, int j) {
        const uint32_t d[4] = {head.of[j].x, head.of[j].y, head.of[j].z, head.of[j].w};
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t size = (i % 2 ? d[i / 2] >> 16 : d[i / 2]) & 0x7fff;
            largest = size > largest ? size : largest;
        }
        const int exponent = largest >= 0x400 ? static_cast<int>(largest >> 10) : 1, k = 29 - exponent;
        // 2^k may be more than float16 has: two factors
        const uint32_t powers[2] = {static_cast<uint32_t>(15 + k / 2) << 10,
                                    static_cast<uint32_t>(15 + k - k / 2) << 10};
        Row row;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            row.scales[i] = half2_mul(half2_mul(d[i], powers[0] * 0x10001), powers[1] * 0x10001);
        const uint32_t bits = static_cast<uint32_t>(127 + 24 - k) << 23;
        memcpy(&row.power, &bits, 4);
        return row;
    }

    __device__ static __forceinline__ float factor(const Row& row) { return row.power; }

    __device__ static __forceinline__ void unpack(const Words& words, const Row (&rows)[2], int unit,
                                                  uint32_t (&a)[4][4]) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int group = 0; group < 2; ++group) {
                const uint32_t s = byte_permute(rows[j].scales[unit], 0, group == 0 ? 0x1010 : 0x3232);
                const uint32_t zero = half2_mul(s, 0x80808080);  // -128 * 2^-24
                const uint4& w = words.w[group];
#pragma unroll
                for (int sixteen = 0; sixteen < 2; ++sixteen) {
                    const uint32_t word = j == 0 ? (sixteen == 0 ? w.x : w.y) : (sixteen == 0 ? w.z : w.w);
                    const uint32_t bytes = word ^ 0x80808080;  // signed: 128 is added
                    a[2 * group + sixteen][j] = half2_fma(bytes & 0x00ff00ff, s, zero);
                    a[2 * group + sixteen][2 + j] = half2_fma((bytes >> 8) & 0x00ff00ff, s, zero);
                }
            }
        }
    }
};

}  // namespace pydiffusion::cuda
