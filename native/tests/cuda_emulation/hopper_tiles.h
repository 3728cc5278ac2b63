// The emulated twin of backend/cuda/hopper_tiles.cuh, which includes this in its place.
#pragma once

#include <cmath>

#include "cuda_emulation/hopper.h"

namespace pydiffusion::cuda {

inline uint32_t packed_half2(float low, float high) { return half2_of(low, high); }

template <int n>
void give_registers() {}
template <int n>
void take_registers() {}

inline void barrier_arrive(uint64_t* barrier, PYDIFFUSION_SITE) {
    emulation::arrive_at_memory_barrier(barrier, 0, {function, file, line});
}
// Chunk c of row r begins at data + r * row_bytes + c * 128.
struct TensorMap {
    const unsigned char* data;
    int64_t row_bytes;
    int32_t n_rows, box_rows, box_chunks;
};

inline void prefetch_map(const TensorMap&) {}

// As copy_bulk(); rows beyond the matrix are not read.
inline void copy_box(unsigned char* shared, const TensorMap& map, int row, int chunk, uint64_t* barrier,
                     PYDIFFUSION_SITE) {
    alignas(16) static const unsigned char zeros[16] = {};
    const emulation::Site site = {function, file, line};
    if (reinterpret_cast<uintptr_t>(shared) % 128) emulation::fail("copy_box to a misaligned address", site);
    std::memset(shared, 0xff, static_cast<size_t>(map.box_chunks) * map.box_rows * 128);
    for (int c = 0; c < map.box_chunks; ++c) {
        for (int r = 0; r < map.box_rows; ++r) {
            const unsigned char* source = map.data + (row + r) * map.row_bytes + (chunk + c) * 128;
            for (int piece = 0; piece < 8; ++piece) {
                emulation::add_bulk_copy({shared + c * map.box_rows * 128 + swizzled(r, piece),
                                          row + r < map.n_rows ? source + 16 * piece : zeros, 16},
                                         barrier, site);
            }
        }
    }
}
class TransposedOperand {
  public:
    TransposedOperand(const unsigned char* atoms, int atom_bytes) : atoms_(atoms), atom_bytes_(atom_bytes) {}
    // Values k and k + 1 of n.
    uint32_t pair(int n, int k) const { return at(n, k) | static_cast<uint32_t>(at(n, k + 1)) << 16; }

  private:
    uint16_t at(int n, int k) const {
        uint16_t value;
        std::memcpy(&value, atoms_ + n / 64 * atom_bytes_ + swizzled(k, n % 64 / 8) + 2 * (n % 8),
                    sizeof value);
        return value;
    }

    const unsigned char* atoms_;
    int atom_bytes_;
};

// Each warp of the group by itself, with its 16 rows of a.
template <int n>
void wgmma(float (&d)[n][4], const SharedOperand& a, int a_offset, const SharedOperand& b, int b_offset,
           int step, bool add, PYDIFFUSION_SITE) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32 % 4;
    const int row = 16 * warp + lane / 4, k = 16 * step + lane % 4 * 2;
    const uint32_t operand[4] = {a.pair(a_offset, row, k), a.pair(a_offset, row + 8, k),
                                 a.pair(a_offset, row, k + 8), a.pair(a_offset, row + 8, k + 8)};
    wgmma(d, operand, b, b_offset, step, add, function, file, line);
}

template <int n>
void wgmma(float (&d)[n][4], const uint32_t (&a)[4], const TransposedOperand& b, int step, PYDIFFUSION_SITE) {
    const int lane = static_cast<int>(threadIdx.x) % 32, k = 16 * step + lane % 4 * 2;
    for (int part = 0; part < n; ++part) {
        const int n_of_lane = 8 * part + lane / 4;
        const uint32_t operand[2] = {b.pair(n_of_lane, k), b.pair(n_of_lane, k + 8)};
        mma_16x8x16(d[part], a, operand, function, file, line);
    }
}

}  // namespace pydiffusion::cuda
