// Top-k of the MoE router as a graph node.
#pragma once

#include <cstdint>

#include "ggml.h"

namespace pydiffusion {

// Indices of the k largest entries of each row of values [n, n_rows], largest first -> I32 [k, n_rows]. Ties
// are in index order; NaN compares as -infinity. (ggml sorts with a comparison that is inconsistent for NaN,
// and may then access memory outside the row.)
ggml_tensor* top_k(ggml_context* ctx, ggml_tensor* values, int64_t k);
bool is_top_k(const ggml_tensor* node);

}  // namespace pydiffusion
