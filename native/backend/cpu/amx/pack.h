// Packs float32 activations into bfloat16 tiles, and stores accumulator tiles as float32 rows.
#pragma once

#include <cstdint>

#include "backend/cpu/amx/tile_gemm.h"

namespace pydiffusion {
namespace gemm {

// Packs kTileRows activations of `n` elements into depth_of(n) tiles, the last one padded with zeros; a null
// activation becomes zeros.
void pack_activations(const float* const* activations, int64_t n, uint16_t* tiles);

// Splits each of 32 values into two bfloat16 halves: the nearest bfloat16, and the residual's. The relative
// error of their sum is 2^-17. Values whose bit in `valid` is 0 are not read, and become 0.
void split(const float* values, uint32_t valid, uint16_t* high, uint16_t* low);

// Transposes an accumulator tile into its results: writes `n_rows` elements (at most kTileRows) to each of
// the `n_activations` targets.
void store_tile(const float* tile, int64_t n_rows, float* const* targets, int64_t n_activations);

}  // namespace gemm
}  // namespace pydiffusion
