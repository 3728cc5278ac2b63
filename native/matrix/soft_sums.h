// Sums of embedding rows weighted by probabilities, made of tiles.
#pragma once

#include <cstdint>
#include <memory>

#include "kernels.h"
#include "unpack.h"

namespace pydiffusion {
namespace matrix {

constexpr int64_t kSoftRows = 256;     // of the embedding, at a time
constexpr int64_t kSoftColumns = 256;  // of it

// The sums of up to `n_tokens` tokens over up to kSoftColumns columns of the embedding. A probability goes
// into the product as the sum of two bfloat16 numbers, which leaves an error of 2**-17 of it; the rows as
// one.
class SoftSums {
  public:
    explicit SoftSums(int64_t n_tokens);

    void clear() { empty_ = true; }
    // Adds, for token t, probability p[t][r] times the columns [first, first + n) of row r, for all rows (up
    // to kSoftRows). Both numbers are as unpack() wants them.
    void add(Kernel kernel, const float* const* p, int64_t n_tokens, const Rows& rows, int64_t first,
             int64_t n);
    // out[0..n) += the sums of token t.
    void add_to(float* out, int64_t t, int64_t n) const;

  private:
    struct Free {
        void operator()(void* p) const;
    };
    template <typename T>
    using Numbers = std::unique_ptr<T[], Free>;

    int64_t n_tiles_;            // of tokens
    Numbers<uint16_t> high_;     // [tile of tokens][depth]
    Numbers<uint16_t> low_;      // likewise
    Numbers<uint16_t> rows_;     // 32 rows, unpacked
    Numbers<uint16_t> columns_;  // [tile of columns][depth]
    Numbers<float> products_;    // as multiply() has them, two tiles of tokens at a time
    bool empty_ = true;
};

}  // namespace matrix
}  // namespace pydiffusion
