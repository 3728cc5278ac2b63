// Quantized weights as operands of expert_matmul_kernels.cuh. A weight is scale * (q - zero) with an integer
// q >= 0 of at most 8 bits. Its bits are those of the subnormal float16 q * 2^-24, which tensor cores
// multiply exactly: no conversion is needed. Scales and zeros are applied to sums of float32:
//
//   sum of w x = sum over groups of scale * 2^24 * (sum of q 2^-24 x)  +  factor * sum over sixteens of a *
//   (sum of x)
//
// A chunk is 256 weights of a row (1 block of Q4_K or Q6_K, 8 of Q8_0), a unit 64 of them in two groups of
// 32, each of two sixteens. Of a sixteen, thread t of a quad has the weights 4t to 4t + 3, in pairs (0, 2)
// and (1, 3), as the halves of a word hold them.
#pragma once

#include <cstdint>

#include "backend/cuda/primitives.cuh"
#include "util/block_sizes.h"

namespace pydiffusion::cuda {

constexpr int kChunk = kSuperBlockWeights, kUnits = 4, kSixteens = 16;
constexpr float kSubnormal = 16777216.0f;  // 2^24

// For a fragment of [16, 8]: the first two values are of row g, the others of row g + 8.
__device__ __forceinline__ void add_scaled(float (&sums)[4], float low, float high,
                                           const float (&partial)[4]) {
    sums[0] += low * partial[0];
    sums[1] += low * partial[1];
    sums[2] += high * partial[2];
    sums[3] += high * partial[3];
}

// A row's chunk in shared memory, which begins at a multiple of 2 bytes, or of 16 if `aligned`.
template <bool aligned>
struct Bytes {
    const unsigned char* words;  // the multiple of 4 at or below the chunk's begin
    uint32_t selectors[2];       // of byte_permute(), for offsets that are 0 or 2 modulo 4

    Bytes() = default;
    __device__ __forceinline__ Bytes(const unsigned char* row, int shift) : words(row + (shift & ~3)) {
        selectors[0] = shift & 2 ? 0x5432 : 0x3210;
        selectors[1] = shift & 2 ? 0x7654 : 0x5432;
    }

    // The 4 bytes from an even offset on, which the compiler knows.
    __device__ __forceinline__ uint32_t at(int offset) const {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(words + (offset & ~3));
        return aligned ? from[0] : byte_permute(from[0], from[1], selectors[offset / 2 % 2]);
    }
};

// The decoded part of a row's chunk.
template <int kScales>
struct Table {
    float scales[kScales];      // of groups or sixteens, in the order of the weights, times kSubnormal
    uint32_t a[kSixteens / 2];  // float16 pairs
    float factor, padding[3];
};

// Each format has:
//   kChunkBytes            of a row's chunk
//   kPitch                 distance of rows in shared memory
//   kAligned               whether chunks begin at multiples of 16 bytes
//   kScales                of a chunk: 8 (groups) or 16 (sixteens)
//   decode(chunk, half, n_left, table)      the table's entries for weights [128 * half, 128 * half + 128),
//   zeros
//                                           from the n_left-th of the chunk on: those are another row's
//   group_begin(unit, group)                index of the group's first weight in the chunk
//   unpack(chunk, unit, q)                  [group][sixteen][pair]; `chunk` is advanced by the thread's 4t
//   bytes

struct Q4K {  // float16 d and dmin, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles
    static constexpr int kChunkBytes = kQ4KBytes, kPitch = kQ4KBytes, kScales = 8;
    static constexpr bool kAligned = true;

    __device__ static __forceinline__ void decode(const Bytes<true>& chunk, int half, int /*n_left*/,
                                                  Table<8>& table) {
        const uint4 head = *reinterpret_cast<const uint4*>(chunk.words);
        uint32_t scales = head.y & 0x3f3f3f3f, minima = head.z & 0x3f3f3f3f;
        if (half == 1) {
            scales = (head.w & 0x0f0f0f0f) | ((head.y >> 2) & 0x30303030);
            minima = ((head.w >> 4) & 0x0f0f0f0f) | ((head.z >> 2) & 0x30303030);
        }
        const float d = half_to_float(static_cast<uint16_t>(head.x)) * kSubnormal;
        const float odd = d / 16.0f;  // their nibbles are the upper ones
        *reinterpret_cast<float4*>(table.scales + 4 * half) = make_float4(
            d * static_cast<float>(scales & 0xff), odd * static_cast<float>((scales >> 8) & 0xff),
            d * static_cast<float>((scales >> 16) & 0xff), odd * static_cast<float>(scales >> 24));
        *reinterpret_cast<uint4*>(table.a + 4 * half) =  // each byte as the halves of a word
            make_uint4(byte_permute(minima, 0, 0x4040), byte_permute(minima, 0, 0x4141),
                       byte_permute(minima, 0, 0x4242), byte_permute(minima, 0, 0x4343));
        if (half == 0) table.factor = half_to_float(static_cast<uint16_t>(head.x >> 16)) * -kSubnormal;
    }

    __device__ static __forceinline__ int group_begin(int unit, int group) { return 64 * unit + 32 * group; }

    __device__ static __forceinline__ void unpack(const Bytes<true>& chunk, int unit,
                                                  uint32_t (&q)[2][2][2]) {
#pragma unroll
        for (int sixteen = 0; sixteen < 2; ++sixteen) {
            const uint32_t word = chunk.at(16 + 32 * unit + 16 * sixteen);
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                q[0][sixteen][pair] = (word >> (8 * pair)) & 0x000f000f;
                q[1][sixteen][pair] = (word >> (8 * pair)) & 0x00f000f0;
            }
        }
    }
};

struct Q6K {  // 128 bytes of low nibbles, 64 of high bit pairs, 16 scales of 8 bits, float16 d; zero is 32
    static constexpr int kChunkBytes = kQ6KBytes, kPitch = 224, kScales = 16;
    static constexpr bool kAligned = false;

    __device__ static __forceinline__ void decode(const Bytes<false>& chunk, int half, int /*n_left*/,
                                                  Table<16>& table) {
        const float d = half_to_float(static_cast<uint16_t>(chunk.at(208)));
        const uint32_t bytes[2] = {half == 0 ? chunk.at(192) : chunk.at(200),
                                   half == 0 ? chunk.at(196) : chunk.at(204)};
        float s[8];
#pragma unroll
        for (int i = 0; i < 8; ++i)
            s[i] = static_cast<float>(static_cast<int8_t>(bytes[i / 4] >> (8 * (i % 4))));
        float4* scales = reinterpret_cast<float4*>(table.scales + 8 * half);
        const float scaled = d * kSubnormal;
        scales[0] = make_float4(scaled * s[0], scaled * s[1], scaled * s[2], scaled * s[3]);
        scales[1] = make_float4(scaled * s[4], scaled * s[5], scaled * s[6], scaled * s[7]);
        *reinterpret_cast<uint4*>(table.a + 4 * half) = make_uint4(
            half2_of(s[0], s[1]), half2_of(s[2], s[3]), half2_of(s[4], s[5]), half2_of(s[6], s[7]));
        if (half == 0) table.factor = d * -32.0f;
    }

    __device__ static __forceinline__ int group_begin(int unit, int group) {
        return 128 * (unit / 2) + 32 * (unit % 2) + 64 * group;
    }

    __device__ static __forceinline__ void unpack(const Bytes<false>& chunk, int unit,
                                                  uint32_t (&q)[2][2][2]) {
        const int half = unit / 2, part = unit % 2;
#pragma unroll
        for (int sixteen = 0; sixteen < 2; ++sixteen) {
            const uint32_t low = chunk.at(64 * half + 32 * part + 16 * sixteen);
            const uint32_t high = chunk.at(128 + 32 * half + 16 * sixteen);
            const uint32_t upper[2] = {part == 0 ? high << 4 : high << 2, part == 0 ? high : high >> 2};
#pragma unroll
            for (int group = 0; group < 2; ++group) {
                const uint32_t bytes = ((low >> (4 * group)) & 0x0f0f0f0f) | (upper[group] & 0x30303030);
                q[group][sixteen][0] = bytes & 0x00ff00ff;
                q[group][sixteen][1] = (bytes >> 8) & 0x00ff00ff;
            }
        }
    }
};

struct Q80 {  // 8 blocks of float16 d and 32 signed bytes; with 128 added, zero is 128
    static constexpr int kChunkBytes = kChunk / kBlockWeights * kQ8_0Bytes, kPitch = 288, kScales = 8;
    static constexpr bool kAligned = false;

    __device__ static __forceinline__ void decode(const Bytes<false>& chunk, int half, int n_left,
                                                  Table<8>& table) {
        uint32_t d[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t scale =
                (half == 0 ? chunk.at(kQ8_0Bytes * i) : chunk.at(kQ8_0Bytes * (4 + i))) & 0xffff;
            d[i] = kBlockWeights * (4 * half + i) < n_left ? scale : 0;
        }
        *reinterpret_cast<float4*>(table.scales + 4 * half) =
            make_float4(half_to_float(static_cast<uint16_t>(d[0])) * kSubnormal,
                        half_to_float(static_cast<uint16_t>(d[1])) * kSubnormal,
                        half_to_float(static_cast<uint16_t>(d[2])) * kSubnormal,
                        half_to_float(static_cast<uint16_t>(d[3])) * kSubnormal);
        *reinterpret_cast<uint4*>(table.a + 4 * half) =
            make_uint4(d[0] | d[0] << 16, d[1] | d[1] << 16, d[2] | d[2] << 16, d[3] | d[3] << 16);
        if (half == 0) table.factor = -128.0f;
    }

    __device__ static __forceinline__ int group_begin(int unit, int group) { return 64 * unit + 32 * group; }

    __device__ static __forceinline__ void unpack(const Bytes<false>& chunk, int unit,
                                                  uint32_t (&q)[2][2][2]) {
#pragma unroll
        for (int group = 0; group < 2; ++group) {
#pragma unroll
            for (int sixteen = 0; sixteen < 2; ++sixteen) {
                const uint32_t bytes =
                    chunk.at(kQ8_0Bytes * (2 * unit + group) + 2 + 16 * sixteen) ^ 0x80808080;
                q[group][sixteen][0] = bytes & 0x00ff00ff;
                q[group][sixteen][1] = (bytes >> 8) & 0x00ff00ff;
            }
        }
    }
};

}  // namespace pydiffusion::cuda
