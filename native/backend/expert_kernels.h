// Expert matmuls of ggml's CUDA backend by kernels of ours: Q4_K, Q6_K and Q8_0 on GPUs of compute
// capability 8.0 or newer.
#pragma once

#include <memory>

#include "ggml-backend.h"

namespace pydiffusion {

// Lets a CUDA backend use them where they apply, until the result is destroyed. Null if the GPU can't run
// them, or not with several blocks on a multiprocessor unless wherever_possible.
std::shared_ptr<void> use_expert_kernels(ggml_backend_t backend, bool wherever_possible);

}  // namespace pydiffusion
