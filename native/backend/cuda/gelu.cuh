// GELU, as backend/cpu/fused_rows.cpp computes it.
#pragma once

#include "backend/cuda/primitives.cuh"

namespace pydiffusion::cuda {

// gelu_tanh(x) = x / 2 * (1 + tanh(y)) = x / (1 + exp(-2 y)), with y = sqrt(2 / pi) * (x + 0.044715 x^3).
__device__ __forceinline__ float gelu(float x) {
    constexpr float a = static_cast<float>(-2.0 * 0.79788456080286535588 * 1.44269504088896340736);
    constexpr float b = a * 0.044715f;
    // Where the power is infinite, gelu is 0 to float precision.
    return fast_divide(x, 1.0f + fast_exp2(x * (a + b * x * x)));
}

}  // namespace pydiffusion::cuda
