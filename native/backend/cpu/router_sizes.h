// Sizes of the router's kernels (cuda/router_kernels.cuh): each block multiplies a tile of tokens and experts
// over a slice of the row.
#pragma once

#include <cstdint>

namespace pydiffusion {

constexpr int kRouterTile = 64;    // tokens of a block, and its experts
constexpr int kRouterSlice = 176;  // elements of a row that it multiplies
constexpr int32_t kMaxRouted = 256;
// Longer prompts are left to cuBLAS: many tokens fill a GPU without slices, which take memory.
constexpr int64_t kMaxRoutedTokens = 1024;

// Floats of scratch memory: for each slice the scores of whole tiles of experts.
constexpr int64_t router_scratch(int64_t d, int64_t n_experts, int64_t n_tokens) {
    return (d + kRouterSlice - 1) / kRouterSlice * n_tokens * ((n_experts + kRouterTile - 1) / kRouterTile) *
           kRouterTile;
}

}  // namespace pydiffusion
