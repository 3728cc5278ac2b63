// Unpacks (dequantizes) rows of weights into bfloat16 tiles.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cpu/amx/tile_gemm.h"
#include "ggml.h"

namespace pydiffusion {
namespace gemm {

// Whether rows of `n_per_row` weights of this type can be unpacked: types for which rounding to bfloat16
// loses far less than their quantization did, and unpacking is faster than ggml's matmul. Only rows of BF16
// may end within a tile.
bool can_unpack(ggml_type type, int64_t n_per_row);

// A range of elements of each of `n_rows` rows: `n` from `first` on, both multiples of 256 unless the row
// ends there.
struct Rows {
    ggml_type type;
    const char* data;
    size_t row_bytes;
    int64_t n_rows;
    int64_t first, n;
};

// Memory to prefetch: `n_bytes` at data + r * stride while row r is unpacked. May extend beyond allocations.
struct Prefetch {
    const char* data = nullptr;
    size_t stride = 0, n_bytes = 0;
};

// Writes 1 or 2 (n_rows > kTileRows) times depth_of(n) tiles; what is missing of the last tiles is zero.
// Prefetches `ahead` into L2, spread over the rows: in bursts it would delay the reads of the rows
// themselves.
void unpack(const Rows& rows, uint16_t* tiles, const Prefetch& ahead);

}  // namespace gemm
}  // namespace pydiffusion
