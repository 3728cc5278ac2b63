// BF16 values by integer arithmetic: as fast as the instructions where memory is the limit, also on GPUs
// without them and in the tests' emulation.
#pragma once

#include <cstdint>

#include "backend/cuda/primitives.cuh"

namespace pydiffusion::cuda {

struct Bfloat16 {
    uint16_t bits;
};

// The nearest BF16, ties to even; a NaN stays one.
__device__ __forceinline__ Bfloat16 bfloat16_of(float x) {
    const uint32_t bits = __float_as_uint(x);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>((is_nan ? bits | 0x400000u : rounded) >> 16)};
}

// Two of them, the first in the low half.
__device__ __forceinline__ uint32_t bfloat16x2_of(float low, float high) {
    return bfloat16_of(low).bits | static_cast<uint32_t>(bfloat16_of(high).bits) << 16;
}

}  // namespace pydiffusion::cuda
