// Probability-weighted sums of embedding rows, as AMX tile GEMMs.
#pragma once

#include <cstdint>

#include "backend/cpu/amx/tile_gemm.h"
#include "backend/cpu/amx/unpack.h"
#include "util/aligned_buffer.h"

namespace pydiffusion {
namespace gemm {

constexpr int64_t kSoftRows = 256;  // embedding rows at a time
constexpr int64_t kSoftDims = 512;  // embedding dims at a time

// The sums of up to `n_tokens` tokens over up to kSoftDims dims of the embedding. Probabilities are split
// into two bfloat16 halves, for a relative error of 2^-17; embedding rows are rounded to bfloat16.
class WeightedSums {
  public:
    explicit WeightedSums(int64_t n_tokens);

    void clear() { empty_ = true; }
    // Adds p[t][r] times row r to the sums of token t, for up to kSoftRows rows of up to kSoftDims elements.
    void add(const float* const* p, int64_t n_tokens, const Rows& rows);
    // out[0..n) += the sums of token t.
    void add_to(float* out, int64_t t, int64_t n) const;

  private:
    int64_t n_tiles_;                    // of tokens
    AlignedBuffer<uint16_t> tokens_;     // [token tile][depth]: the high halves, then the low ones
    AlignedBuffer<uint16_t> rows_;       // 32 rows, unpacked
    AlignedBuffer<uint16_t> dims_;       // [dim tile][depth]
    AlignedBuffer<float> accumulators_;  // as in tile_gemm(), two tiles of tokens at a time
    bool empty_ = true;
};

}  // namespace gemm
}  // namespace pydiffusion
