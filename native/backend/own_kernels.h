// Kernels of our own in ggml's CUDA backend: expert matmuls of Q4_K, Q6_K and Q8_0, and the fused rows of
// fused_rows.h and top_k.h.
#pragma once

#include <memory>

#include "ggml-backend.h"

namespace pydiffusion {

// Lets a CUDA backend use them where they apply, until the result is destroyed. Null if the GPU can't run the
// expert matmuls (compute capability 8.0 or newer), or not with several blocks on a multiprocessor unless
// wherever_possible.
std::shared_ptr<void> use_own_kernels(ggml_backend_t backend, bool wherever_possible);

}  // namespace pydiffusion
