// What kernels need beyond CUDA C++: PTX instructions, and conversions of float16. Tests replace this file by
// functions for the CPU.
#pragma once

#if defined(PYDIFFUSION_EMULATE_CUDA)
#include "cuda_emulation/primitives.h"
#else

#include <cuda_fp16.h>

#include <cstdint>

namespace pydiffusion::cuda {

// The instructions of compute capability 8.0 are left out for older GPUs, where kernels with them must not be
// launched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define PD_CAPABILITY_8(...) __trap()
#else
#define PD_CAPABILITY_8(...) asm volatile(__VA_ARGS__)
#endif

// First in a kernel that may be launched before the one before it in its stream has finished (programmatic
// dependent launch): waits for it, and lets the next one begin to wait.
__device__ __forceinline__ void await_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

// Starts to copy 16 bytes from global to shared memory, both aligned to 16; bytes from n_bytes on become 0
// and are not read.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int n_bytes) {
    const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    PD_CAPABILITY_8("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(global),
                    "r"(n_bytes) : "memory");
}

// Closes a group of copies of this thread.
__device__ __forceinline__ void copy_async_commit() {
    PD_CAPABILITY_8("cp.async.commit_group;" :: : "memory");
}

// Waits until at most N of this thread's groups are under way.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
    PD_CAPABILITY_8("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#undef PD_CAPABILITY_8
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define PD_CAPABILITY_8(...) __trap()
#else
#define PD_CAPABILITY_8(...) asm(__VA_ARGS__)  // not volatile: the compiler may move it
#endif

// d [16, 8] += a [16, 16] * b [16, 8] by a warp, float16 operands and float32 sums; the fragments are those
// of PTX's mma.m16n8k16.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    PD_CAPABILITY_8(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};" : "+f"(d[0]),
        "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
        "r"(b[1]));
}

// d [16, 8] = a [16, 16] * b [16, 8]
__device__ __forceinline__ void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
    PD_CAPABILITY_8(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};" : "=f"(d[0]),
        "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]),
        "f"(0.0f));
}

#undef PD_CAPABILITY_8

// Two floats rounded to the nearest float16, the first in the low half.
__device__ __forceinline__ uint32_t half2_of(float low, float high) {
    return static_cast<uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16 |
           __half_as_ushort(__float2half_rn(low));
}

__device__ __forceinline__ float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// The largest of a warp's values, in each of its lanes.
__device__ __forceinline__ uint32_t max_of_warp(uint32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, value);
#else
    for (int offset = 16; offset > 0; offset /= 2)
        value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
#endif
}

// To 2 units in the last place; less than the smallest normal float becomes 0, a / b of larger b than 2^126
// too.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float fast_divide(float a, float b) { return __fdividef(a, b); }

// Four of the eight bytes of b:a, chosen by the selector's four lowest nibbles.
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

}  // namespace pydiffusion::cuda

#endif
