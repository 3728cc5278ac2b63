// A product's activations as tiles, and its results back as activations.
#pragma once

#include <cstdint>

#include "backend/cpu/amx/tile_gemm.h"

namespace pydiffusion {
namespace gemm {

// kTileRows activations of `n` float32 numbers, a multiple of kTileDepth, as n / kTileDepth tiles; a null
// activation is zeros.
void pack_activations(const float* const* activations, int64_t n, uint16_t* tiles);

// 32 numbers as two bfloat16 numbers each: the nearest, and the nearest to what is left; the error of their
// sum is 2**-17 of the number. Those whose bit in `valid` is 0 are not read, and become 0.
void split(const float* numbers, uint32_t valid, uint16_t* high, uint16_t* low);

// A tile of a product to the activations: `n_rows` numbers (at most kTileRows) to each of the `n_activations`
// targets.
void store_tile(const float* product, int64_t n_rows, float* const* targets, int64_t n_activations);

}  // namespace gemm
}  // namespace pydiffusion
