// Rows of weights of any type, unpacked into tiles.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cpu/amx/tile_gemm.h"
#include "ggml.h"

namespace pydiffusion {
namespace gemm {

// Whether rows of `n_per_row` weights of this type go into tiles of bfloat16: all that lose far less by it
// than their own quantization has lost, and that are unpacked faster than ggml multiplies them.
bool can_unpack(ggml_type type, int64_t n_per_row);

// Some weights of each of `n_rows` rows: `n` from number `first` on, both multiples of 256 unless the row
// ends there.
struct Rows {
    ggml_type type;
    const char* data;
    size_t row_bytes;
    int64_t n_rows;
    int64_t first, n;
};

// Memory that is needed soon: for each row that is unpacked meanwhile `n_bytes`, `stride` further each time.
// It may end anywhere.
struct Prefetch {
    const char* data = nullptr;
    size_t stride = 0, n_bytes = 0;
};

// They become 1 or 2 (n_rows > kTileRows) times n / kTileDepth tiles; what is missing of the last tiles' rows
// is zero. What is ahead is brought into the second cache meanwhile, row by row: faster, it would hold up the
// reads of what is being unpacked.
void unpack(const Rows& rows, uint16_t* tiles, const Prefetch& ahead);

}  // namespace gemm
}  // namespace pydiffusion
