// Sizes of the router's kernels (cuda/router_kernels.cuh): each block multiplies a tile of tokens and experts
// over a slice of the row.
#pragma once

#include <cstdint>

#include "backend/row_math.h"

namespace pydiffusion {

constexpr int kRouterTile = 64;    // tokens of a block, and its experts
constexpr int kRouterSlice = 176;  // elements of a row that it multiplies
constexpr int32_t kMaxRouted = 256;
// Longer prompts are left to cuBLAS: many tokens fill a GPU without slices, which take memory.
constexpr int64_t kMaxRoutedTokens = 1024;

PD_HOST_DEVICE int32_t router_slices(int32_t d) { return (d + kRouterSlice - 1) / kRouterSlice; }
PD_HOST_DEVICE int32_t router_tiles(int32_t n) { return (n + kRouterTile - 1) / kRouterTile; }
// Floats of scratch memory: the scores of each slice.
inline int64_t router_scratch(int32_t d, int32_t n_experts, int32_t n_tokens) {
    return int64_t{router_slices(d)} * n_tokens * router_tiles(n_experts) * kRouterTile;
}

}  // namespace pydiffusion
