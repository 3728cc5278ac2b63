// CUDA's keywords, indices and intrinsics as far as our kernels use them, for the host compiler.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_emulation/emulate.h"

#define __global__ __attribute__((unused))
#define __device__ __attribute__((unused))
#define __host__
#define __forceinline__ inline
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
// One block runs at a time. The section lets emulate() find the variables, to fill them before each block; a
// kernel that has some must have internal linkage (a section can't have parts of discardable functions).
#if defined(__ELF__)
#define __shared__ static __attribute__((section("pydiffusion_shared")))
#else
#define __shared__ static
#endif

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// The line of the kernel that calls an intrinsic.
#define PYDIFFUSION_SITE                                                              \
    const char *function = __builtin_FUNCTION(), const char *file = __builtin_FILE(), \
               int line = __builtin_LINE()

inline void __syncthreads(PYDIFFUSION_SITE) { pydiffusion::emulation::block_barrier({function, file, line}); }

namespace pydiffusion::emulation {

// Combine functions, compiled without ThreadSanitizer's checks. The first word given is the offset or lane.
void shuffle_xor(const Words* given, Words* got, uint32_t mask);
void shuffle_up(const Words* given, Words* got, uint32_t mask);
void shuffle_down(const Words* given, Words* got, uint32_t mask);
void shuffle_from(const Words* given, Words* got, uint32_t mask);
void ballot(const Words* given, Words* got, uint32_t mask);

// d += a * b, each lane with its part of the three tiles (mma.sync.m16n8k16.row.col.f32.f16.f16.f32).
void mma_of_lane(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site& site);

template <typename T>
T shuffled(const char* what, uint32_t mask, T value, uint32_t lane_or_offset, Combine combine,
           const Site& site) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
    Words words = {};
    words.word[0] = lane_or_offset;
    std::memcpy(words.word + 1, &value, sizeof(T));
    warp_collective(what, mask, words, combine, false, site);
    std::memcpy(&value, words.word + 1, sizeof(T));
    return value;
}

inline uint32_t balloted(const char* what, uint32_t mask, bool predicate, const Site& site) {
    Words words = {};
    words.word[0] = predicate;
    warp_collective(what, mask, words, ballot, false, site);
    return words.word[0];
}

}  // namespace pydiffusion::emulation

inline void __syncwarp(unsigned mask = 0xffffffffu, PYDIFFUSION_SITE) {
    pydiffusion::emulation::Words words = {};
    pydiffusion::emulation::warp_collective("__syncwarp", mask, words, nullptr, true, {function, file, line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int offset, PYDIFFUSION_SITE) {
    return pydiffusion::emulation::shuffled("__shfl_xor_sync", mask, value, static_cast<uint32_t>(offset),
                                            pydiffusion::emulation::shuffle_xor, {function, file, line});
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned offset, PYDIFFUSION_SITE) {
    return pydiffusion::emulation::shuffled("__shfl_up_sync", mask, value, offset,
                                            pydiffusion::emulation::shuffle_up, {function, file, line});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset, PYDIFFUSION_SITE) {
    return pydiffusion::emulation::shuffled("__shfl_down_sync", mask, value, offset,
                                            pydiffusion::emulation::shuffle_down, {function, file, line});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, PYDIFFUSION_SITE) {
    return pydiffusion::emulation::shuffled("__shfl_sync", mask, value, static_cast<uint32_t>(lane),
                                            pydiffusion::emulation::shuffle_from, {function, file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, PYDIFFUSION_SITE) {
    return pydiffusion::emulation::balloted("__ballot_sync", mask, predicate != 0, {function, file, line});
}

inline int __any_sync(unsigned mask, int predicate, PYDIFFUSION_SITE) {
    return pydiffusion::emulation::balloted("__any_sync", mask, predicate != 0, {function, file, line}) != 0;
}

inline int __all_sync(unsigned mask, int predicate, PYDIFFUSION_SITE) {
    return pydiffusion::emulation::balloted("__all_sync", mask, predicate != 0, {function, file, line}) ==
           mask;
}

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline void __trap(PYDIFFUSION_SITE) { pydiffusion::emulation::fail("__trap", {function, file, line}); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }

template <typename T>
T __ldg(const T* p) {
    return *p;
}

using std::max;
using std::min;

// CUDA's vectors, aligned as on the device: UBSan sees a misaligned one.
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline int atomicAdd(int* address, int value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);  // atomic for ThreadSanitizer's sake
}

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
