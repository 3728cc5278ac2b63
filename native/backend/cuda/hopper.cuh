// What kernels for Hopper need beyond primitives.cuh: wgmma (multiplications by a warpgroup), bulk copies,
// and arithmetic of float16 pairs. Tests replace this file by functions for the CPU.
#pragma once

#include "backend/cuda/primitives.cuh"

namespace pydiffusion::cuda {

// Of wgmma's operand b [k, n] a row of n is in shared memory as "atoms" of 64 k, 128 bytes a row, at
// multiples of 1024 bytes. Piece c of a row, 16 bytes, is at piece c ^ (row % 8), which avoids bank conflicts
// ("128B swizzle").
__device__ __forceinline__ int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) * 16); }

}  // namespace pydiffusion::cuda

#if defined(PYDIFFUSION_EMULATE_CUDA)
#include "cuda_emulation/hopper.h"
#else

namespace pydiffusion::cuda {

// wgmma is an instruction of sm_90a alone. Kernels that are compiled for other GPUs too must leave out what
// calls the functions below, and must not be launched there.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kIsHopper = true;
#else
constexpr bool kIsHopper = false;
#endif

// The block's dynamic shared memory, aligned as swizzled atoms must be.
__device__ __forceinline__ unsigned char* swizzled_shared() {
    extern __shared__ __align__(1024) unsigned char swizzled_memory[];
    return swizzled_memory;
}

// --- pairs of float16 ---

__device__ __forceinline__ uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ uint32_t half2_mul(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ uint32_t half2_add(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// --- copies ---

// An address in shared memory takes one register, a pointer two.
using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* shared) {
    return static_cast<SharedAddress>(__cvta_generic_to_shared(shared));
}

// As the function of primitives.cuh, of all 16 bytes.
__device__ __forceinline__ void copy_async_16(SharedAddress shared, const void* global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// A barrier in shared memory for n arrivals. Its phases are numbered 0, 1, 0, ...; one ends when all have
// arrived and all bytes that they expect have been copied.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int n) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(n) : "memory");
}

// Makes barriers that a thread has initialized known to bulk copies and to all threads, which call it.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();  // racecheck takes even the same thread's first arrival for a race without it
}

__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, int n_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(n_bytes)
                 : "memory");
}

// Waits for the end of a phase.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t phase) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra DONE_%=;\n"
        "bra WAIT_%=;\n"
        "DONE_%=:\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(phase)
        : "memory");
}

// Starts to copy n_bytes from global to shared memory, all multiples of 16; the barrier learns when they are
// there.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int n_bytes, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(shared)),
        "l"(global), "r"(n_bytes), "r"(shared_address(barrier))
        : "memory");
}

// --- wgmma ---

// Before multiplications that read what this thread wrote to shared memory, by copy_async_16() too. (Bulk
// copies write as wgmma reads.)
__device__ __forceinline__ void fence_shared_writes() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Before the first of multiplications whose registers were written by other instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of multiplications.
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most N groups are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from reading results before the wait for them.
template <int n>
__device__ __forceinline__ void pin_results(float (&d)[n][4]) {
#pragma unroll
    for (int i = 0; i < n; ++i)
        asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}

// Operands b in shared memory: atoms from a multiple of 1024 bytes on.
class SharedOperand {
  public:
    // A descriptor's low word: the address and, unused by this layout, a distance of 1. The shuffle tells the
    // compiler that it is the same in all lanes: it may compute with uniform registers, where wgmma wants it.
    __device__ __forceinline__ explicit SharedOperand(const unsigned char* atoms)
        : low_(__shfl_sync(0xffffffffu, (shared_address(atoms) & 0x3ffff) >> 4 | 1u << 16, 0)) {}

    // The descriptor of 16 k of the atom that begins `offset` bytes from the first. The high word: 128B
    // swizzle, groups of 8 rows 1024 bytes apart.
    __device__ __forceinline__ uint64_t descriptor(int offset, int step) const {
        return uint64_t{0x40000040} << 32 | (low_ + offset / 16 + 2 * step);
    }

  private:
    uint32_t low_;
};

// d [64, 8 n] += (or, if !add, =) a [64, 16] * b [16, 8 n] by a warpgroup, float16 operands and float32 sums.
// Each warp has 16 rows, in the fragments of PTX's mma.m16n8k16.
#define PD_WGMMA(n, add, sums, a, b)                                                    \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" n \
    "k16.f32.f16.f16 {" sums "}, {" a "}, " b ", p, 1, 1, 0;\n}\n"
#define PD_SUMS(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define PD_OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add)

__device__ __forceinline__ void wgmma(float (&d)[1][4], const uint32_t (&a)[4], uint64_t b, int add) {
    asm volatile(PD_WGMMA("8", "%9", "%0, %1, %2, %3", "%4, %5, %6, %7", "%8") : PD_SUMS(d[0]) : PD_OPERANDS);
}
__device__ __forceinline__ void wgmma(float (&d)[2][4], const uint32_t (&a)[4], uint64_t b, int add) {
    asm volatile(PD_WGMMA("16", "%13", "%0, %1, %2, %3, %4, %5, %6, %7", "%8, %9, %10, %11", "%12")
                 : PD_SUMS(d[0]), PD_SUMS(d[1])
                 : PD_OPERANDS);
}
__device__ __forceinline__ void wgmma(float (&d)[3][4], const uint32_t (&a)[4], uint64_t b, int add) {
    asm volatile(
        PD_WGMMA("24", "%17", "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11", "%12, %13, %14, %15", "%16")
        : PD_SUMS(d[0]), PD_SUMS(d[1]), PD_SUMS(d[2])
        : PD_OPERANDS);
}

#undef PD_WGMMA
#undef PD_SUMS
#undef PD_OPERANDS

// The same with k 16 * step to 16 * step + 15 of the atom that begins `offset` bytes from b's first.
template <int n>
__device__ __forceinline__ void wgmma(float (&d)[n][4], const uint32_t (&a)[4], const SharedOperand& b,
                                      int offset, int step, bool add) {
    wgmma(d, a, b.descriptor(offset, step), static_cast<int>(add));
}

}  // namespace pydiffusion::cuda

#endif
