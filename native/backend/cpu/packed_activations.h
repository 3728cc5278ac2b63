// Activations packed into bfloat16 tiles: the node that packs them, and how its memory is laid out.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/cpu/amx/tile_gemm.h"
#include "backend/cpu/fused_rows.h"
#include "ggml.h"
#include "util/aligned_buffer.h"

namespace pydiffusion {
namespace gemm {

constexpr int64_t kDepth = 8;  // tiles of each activation that are multiplied at once

// Inputs of a node that packs activations into tiles.
struct Packing {
    const ggml_tensor* x;
    ComputeRow compute_row;  // set: x is not allocated, its rows are computed on demand; null: x is a node
    const ggml_tensor* experts;
    const ggml_tensor* groups;  // the same by expert
    int64_t n_expert;
};

inline int64_t n_tiles_of(int64_t n_activations) { return (n_activations + kTileRows - 1) / kTileRows; }

// Packed activations that are multiplied with the same matrix: kDepth tiles of each of the `n_tiles` tiles,
// then the next kDepth. So what a panel uses is contiguous, without power-of-two strides.
struct PackedBlock {
    uint16_t* data;
    int64_t n_inner, n_tiles;
    int64_t depth = depth_of(n_inner);

    int64_t depth_at(int64_t d) const { return std::min(kDepth, depth - d); }
    int64_t elements_at(int64_t d) const { return std::min(kDepth * kTileDepth, n_inner - d * kTileDepth); }
    // Tile i_tile from depth d on, a multiple of kDepth; activation_stride(d) is between tiles.
    uint16_t* at(int64_t i_tile, int64_t d) const {
        return data + (d * n_tiles + i_tile * depth_at(d)) * kTileElements;
    }
    int64_t activation_stride(int64_t d) const { return depth_at(d) * kTileElements; }
};

inline const Packing& packing_of(const ggml_tensor* packed) {
    return *static_cast<const Packing*>(packed->extra);
}

inline PackedBlock block_of(const ggml_tensor* packed, int64_t first_tile, int64_t n_tiles) {
    const int64_t n_inner = packing_of(packed).x->ne[0];
    return {align(static_cast<uint16_t*>(packed->data)) + first_tile * depth_of(n_inner) * kTileElements,
            n_inner, n_tiles};
}

}  // namespace gemm
}  // namespace pydiffusion
