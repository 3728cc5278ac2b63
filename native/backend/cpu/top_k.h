// The router's choice of experts as a graph node.
#pragma once

#include <cstdint>

#include "ggml.h"

namespace pydiffusion {

// The indices of the k largest entries of each row of values [n, n_rows], best first -> I32 [k, n_rows]. Of
// equal entries the first comes first; NaN counts as least. (ggml sorts with a comparison that NaN breaks,
// and then reads and writes beyond the row.)
ggml_tensor* top_k(ggml_context* ctx, ggml_tensor* values, int64_t k);

}  // namespace pydiffusion
