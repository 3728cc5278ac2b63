// What kernels for Hopper need that keep both operands of a matmul in shared memory: tiles copied by the
// tensor memory accelerator, wgmma with larger tiles and with a transposed operand. Tests replace this file
// by functions for the CPU.
#pragma once

#include "backend/cuda/hopper.cuh"

#if defined(PYDIFFUSION_EMULATE_CUDA)
#include "cuda_emulation/hopper_tiles.h"
#else

#include <cuda.h>

namespace pydiffusion::cuda {

// --- arithmetic ---

// As half2_of(), in one instruction.
__device__ __forceinline__ uint32_t packed_half2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// --- registers: from now on each thread of a warpgroup has n, fewer or more than before ---

template <int n>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}

template <int n>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}

// --- barriers in shared memory ---

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// --- copies of tiles ---

// A matrix in global memory as [chunk][row][64 values], read in boxes of some rows and chunks.
using TensorMap = CUtensorMap;

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts to copy a box to shared memory, where each chunk of it is an atom as swizzled() has it. Rows beyond
// the matrix become 0. The barrier learns when it is there.
__device__ __forceinline__ void copy_box(unsigned char* shared, const TensorMap& map, int row, int chunk,
                                         uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
        "%4}], "
        "[%5];" ::"r"(shared_address(shared)),
        "l"(&map), "r"(0), "r"(row), "r"(chunk), "r"(shared_address(barrier))
        : "memory");
}

// --- wgmma ---

// Operand b [k, n] in shared memory with the n of a k in a row, in atoms of 64 n and all k, `atom_bytes`
// apart.
class TransposedOperand {
  public:
    __device__ __forceinline__ TransposedOperand(const unsigned char* atoms, int atom_bytes)
        : low_(__shfl_sync(
              0xffffffffu,
              (shared_address(atoms) & 0x3ffff) >> 4 | static_cast<uint32_t>(atom_bytes / 16) << 16, 0)) {}

    // Of k 16 * step to 16 * step + 15. The high word: 128B swizzle, groups of 8 k 1024 bytes apart.
    __device__ __forceinline__ uint64_t descriptor(int step) const {
        return uint64_t{0x40000040} << 32 | (low_ + 128 * step);
    }

  private:
    uint32_t low_;
};

#define PD_WGMMA_SHARED(n, add, sums, a, b)                                             \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" n \
    "k16.f32.f16.f16 {" sums "}, " a ", " b ", p, 1, 1, 0, 0;\n}\n"
#define PD_WGMMA_TRANSPOSED(n, sums, a, b)                                                                 \
    "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32.f16.f16 {" sums \
    "}, {" a "}, " b ", p, 1, 1, 1;\n}\n"
#define PD_SUMS(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])

// As wgmma() of hopper.cuh, with a in shared memory too, rows of k like b's.
__device__ __forceinline__ void wgmma(float (&d)[8][4], uint64_t a, uint64_t b, int add) {
    asm volatile(PD_WGMMA_SHARED(
                     "64", "%34",
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
                     "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
                     "%32", "%33")
                 : PD_SUMS(d[0]), PD_SUMS(d[1]), PD_SUMS(d[2]), PD_SUMS(d[3]), PD_SUMS(d[4]), PD_SUMS(d[5]),
                   PD_SUMS(d[6]), PD_SUMS(d[7])
                 : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void wgmma(float (&d)[10][4], uint64_t a, uint64_t b, int add) {
    asm volatile(PD_WGMMA_SHARED(
                     "80", "%42",
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
                     "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
                     "%36, %37, %38, %39",
                     "%40", "%41")
                 : PD_SUMS(d[0]), PD_SUMS(d[1]), PD_SUMS(d[2]), PD_SUMS(d[3]), PD_SUMS(d[4]), PD_SUMS(d[5]),
                   PD_SUMS(d[6]), PD_SUMS(d[7]), PD_SUMS(d[8]), PD_SUMS(d[9])
                 : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void wgmma_transposed(float (&d)[32][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(PD_WGMMA_TRANSPOSED(
                     "256",
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
                     "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
                     "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
                     "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "
                     "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "
                     "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "
                     "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "
                     "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127",
                     "%128, %129, %130, %131", "%132")
                 : PD_SUMS(d[0]), PD_SUMS(d[1]), PD_SUMS(d[2]), PD_SUMS(d[3]), PD_SUMS(d[4]), PD_SUMS(d[5]),
                   PD_SUMS(d[6]), PD_SUMS(d[7]), PD_SUMS(d[8]), PD_SUMS(d[9]), PD_SUMS(d[10]), PD_SUMS(d[11]),
                   PD_SUMS(d[12]), PD_SUMS(d[13]), PD_SUMS(d[14]), PD_SUMS(d[15]), PD_SUMS(d[16]),
                   PD_SUMS(d[17]), PD_SUMS(d[18]), PD_SUMS(d[19]), PD_SUMS(d[20]), PD_SUMS(d[21]),
                   PD_SUMS(d[22]), PD_SUMS(d[23]), PD_SUMS(d[24]), PD_SUMS(d[25]), PD_SUMS(d[26]),
                   PD_SUMS(d[27]), PD_SUMS(d[28]), PD_SUMS(d[29]), PD_SUMS(d[30]), PD_SUMS(d[31])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef PD_WGMMA_SHARED
#undef PD_WGMMA_TRANSPOSED
#undef PD_SUMS

// d [64, 8 n] += (or, if !add, =) a [64, 16] * b [16, 8 n]: k 16 * step to 16 * step + 15 of the atoms that
// begin so many bytes from the operands' first.
template <int n>
__device__ __forceinline__ void wgmma(float (&d)[n][4], const SharedOperand& a, int a_offset,
                                      const SharedOperand& b, int b_offset, int step, bool add) {
    wgmma(d, a.descriptor(a_offset, step), b.descriptor(b_offset, step), static_cast<int>(add));
}

// d [64, 8 n] += a [64, 16] * b [16, 8 n]
template <int n>
__device__ __forceinline__ void wgmma(float (&d)[n][4], const uint32_t (&a)[4], const TransposedOperand& b,
                                      int step) {
    wgmma_transposed(d, a, b.descriptor(step));
}

}  // namespace pydiffusion::cuda

#endif
