// Sums of embedding rows weighted by probabilities, made of AMX tiles.
#pragma once

#include <cstdint>

#include "backend/cpu/amx/tile_gemm.h"
#include "backend/cpu/amx/unpack.h"
#include "util/aligned_buffer.h"

namespace pydiffusion {
namespace gemm {

constexpr int64_t kSoftRows = 256;  // of the embedding, at a time
constexpr int64_t kSoftDims = 512;  // of it

// The sums of up to `n_tokens` tokens over up to kSoftDims activations of the embedding. A probability goes
// into the product as the sum of two bfloat16 numbers, which leaves an error of 2**-17 of it; the rows as
// one.
class WeightedSums {
  public:
    explicit WeightedSums(int64_t n_tokens);

    void clear() { empty_ = true; }
    // Adds, for token t, probability p[t][r] times the numbers of row r, for all rows: up to kSoftRows, of up
    // to kSoftDims numbers.
    void add(const float* const* p, int64_t n_tokens, const Rows& rows);
    // out[0..n) += the sums of token t.
    void add_to(float* out, int64_t t, int64_t n) const;

  private:
    int64_t n_tiles_;                      // of tokens
    AlignedBuffer<uint16_t> tokens_;       // [tile of tokens][depth]: the high halves, then the low ones
    AlignedBuffer<uint16_t> rows_;         // 32 rows, unpacked
    AlignedBuffer<uint16_t> activations_;  // [tile of activations][depth]
    AlignedBuffer<float> products_;        // as multiply() has them, two tiles of tokens at a time
    bool empty_ = true;
};

}  // namespace gemm
}  // namespace pydiffusion
