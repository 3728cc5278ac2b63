// In place of CUDA's header of this name: what our kernels use of it.
#pragma once

#include "cuda_emulation/cuda.h"
#include "cuda_emulation/half.h"

struct __half {
    uint16_t bits;
};

inline __half __float2half(float x) { return {pydiffusion::emulation::half_from(x)}; }
inline float __half2float(__half x) { return pydiffusion::emulation::half_to_float(x.bits); }
inline __half __ushort_as_half(unsigned short x) { return {x}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
