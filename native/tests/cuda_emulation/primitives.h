// The emulated twin of backend/cuda/primitives.cuh, which includes this in its place.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_emulation/cuda.h"
#include "cuda_emulation/half.h"

namespace pydiffusion::cuda {

inline void await_previous_kernel() {}

inline unsigned char* dynamic_shared() { return emulation::block_shared_memory(); }

// The bytes arrive as late as they may, in copy_async_wait; until then the target is 0xff (NaN).
inline void copy_async_16(void* shared, const void* global, int n_bytes, PYDIFFUSION_SITE) {
    const emulation::Site site = {function, file, line};
    if (n_bytes < 0 || n_bytes > 16)
        emulation::fail("copy_async_16 of " + std::to_string(n_bytes) + " bytes", site);
    if (reinterpret_cast<uintptr_t>(shared) % 16)
        emulation::fail("copy_async_16 to a misaligned address", site);
    if (reinterpret_cast<uintptr_t>(global) % 16)
        emulation::fail("copy_async_16 from a misaligned address", site);
    std::memset(shared, 0xff, 16);
    emulation::add_copy({shared, global, n_bytes});
}

inline void copy_async_commit() { emulation::commit_copies(); }

template <int N>
void copy_async_wait(PYDIFFUSION_SITE) {
    emulation::begin_wait(N, {function, file, line});
    emulation::Copy copy;
    while (emulation::take_copy(copy)) {
        unsigned char bytes[16] = {};
        if (copy.n_bytes) std::memcpy(bytes, copy.source, static_cast<size_t>(copy.n_bytes));
        std::memcpy(copy.target, bytes, 16);
    }
}

// Sums 16 terms in double precision and rounds once; a GPU rounds in between, in no documented order.
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PYDIFFUSION_SITE) {
    emulation::mma_of_lane(d, a, b, {function, file, line});
}

inline void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             PYDIFFUSION_SITE) {
    for (float& value : d) value = 0.0f;
    emulation::mma_of_lane(d, a, b, {function, file, line});
}

inline uint32_t half2_of(float low, float high) {
    return emulation::half_from(low) | static_cast<uint32_t>(emulation::half_from(high)) << 16;
}

using emulation::half_to_float;

inline uint32_t max_of_warp(uint32_t value, PYDIFFUSION_SITE) {
    for (int offset = 16; offset > 0; offset /= 2)
        value = std::max(value, __shfl_xor_sync(0xffffffffu, value, offset, function, file, line));
    return value;
}

inline float fast_exp2(float x) { return exp2f(x); }
inline float fast_divide(float a, float b) { return a / b; }

// Byte i of the result: the byte of b:a (b the high word) that nibble i of the selector names.
inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector, PYDIFFUSION_SITE) {
    // The device would repeat a byte's sign.
    if (selector & 0x8888) emulation::fail("byte_permute: a selector above 7", {function, file, line});
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (unsigned i = 0; i < 4; ++i)
        result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}

}  // namespace pydiffusion::cuda
