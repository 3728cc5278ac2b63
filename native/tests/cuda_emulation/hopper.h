// The emulated twin of backend/cuda/hopper.cuh, which includes this in its place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cuda_emulation/cuda.h"
#include "cuda_emulation/half.h"
#include "cuda_emulation/memory_barriers.h"

namespace pydiffusion::cuda {

constexpr bool kIsHopper = true;

inline unsigned char* swizzled_shared() { return emulation::block_shared_memory(); }

inline double half_of(uint32_t pair, int i) {
    return emulation::half_to_float(static_cast<uint16_t>(pair >> 16 * i));
}

inline uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    for (int i = 0; i < 2; ++i) {
        const double exact = half_of(a, i) * half_of(b, i) + half_of(c, i);
        result |= static_cast<uint32_t>(emulation::half_from(exact)) << 16 * i;
    }
    return result;
}

inline uint32_t half2_mul(uint32_t a, uint32_t b) { return half2_fma(a, b, 0x80008000); }  // -0
inline uint32_t half2_add(uint32_t a, uint32_t b) { return half2_fma(a, 0x3c003c00, b); }  // 1

using SharedAddress = unsigned char*;
inline SharedAddress shared_address(unsigned char* shared) { return shared; }

inline void copy_async_16(SharedAddress shared, const void* global, PYDIFFUSION_SITE) {
    copy_async_16(shared, global, 16, function, file, line);
}

inline void barrier_init(uint64_t* barrier, int n, PYDIFFUSION_SITE) {
    emulation::init_memory_barrier(barrier, n, {function, file, line});
}
inline void publish_barriers(PYDIFFUSION_SITE) { emulation::inner_block_barrier({function, file, line}); }
inline void barrier_arrive_expecting(uint64_t* barrier, int n_bytes, PYDIFFUSION_SITE) {
    emulation::arrive_at_memory_barrier(barrier, n_bytes, {function, file, line});
}

// The bytes arrive as late as they may, at the first wait for the barrier; until then the target is NaN.
inline void copy_bulk(void* shared, const void* global, int n_bytes, uint64_t* barrier, PYDIFFUSION_SITE) {
    std::memset(shared, 0xff, static_cast<size_t>(n_bytes));
    emulation::add_bulk_copy({shared, global, n_bytes}, barrier, {function, file, line});
}
inline void barrier_wait(uint64_t* barrier, uint32_t phase, PYDIFFUSION_SITE) {
    const emulation::Site site = {function, file, line};
    if (!emulation::begin_memory_wait(barrier, phase, site)) return;
    emulation::Copy copy;
    while (emulation::take_bulk_copy(barrier, copy))
        std::memcpy(copy.target, copy.source, static_cast<size_t>(copy.n_bytes));
    emulation::end_memory_wait(barrier, site);
}

// Multiplications are done at once: what these functions order is not emulated.
inline void fence_shared_writes() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
// No lane goes on before all have read their operands.
template <int N>
void wgmma_wait(PYDIFFUSION_SITE) {
    emulation::Words words = {};
    emulation::warp_collective("wgmma_wait", 0xffffffffu, words, emulation::ballot, true,
                               {function, file, line});
}
template <int n>
void pin_results(float (&)[n][4]) {}

class SharedOperand {
  public:
    explicit SharedOperand(const unsigned char* atoms) : atoms_(atoms) {}
    // Values k and k + 1 of row n of an atom.
    uint32_t pair(int offset, int n, int k) const {
        uint32_t value;
        std::memcpy(&value, atoms_ + offset + swizzled(n, k / 8) + 2 * (k % 8), sizeof value);
        return value;
    }

  private:
    const unsigned char* atoms_;
};

// Each warp of the group by itself.
template <int n>
void wgmma(float (&d)[n][4], const uint32_t (&a)[4], const SharedOperand& b, int offset, int step, bool add,
           PYDIFFUSION_SITE) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, k = 16 * step + lane % 4 * 2;
    for (int part = 0; part < n; ++part) {
        const uint32_t operand[2] = {b.pair(offset, 8 * part + g, k), b.pair(offset, 8 * part + g, k + 8)};
        if (!add) std::fill_n(d[part], 4, 0.0f);
        mma_16x8x16(d[part], a, operand, function, file, line);
    }
}

}  // namespace pydiffusion::cuda
