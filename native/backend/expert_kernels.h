// Expert matmuls of ggml's CUDA backend by kernels of ours: Q4_K, Q6_K and Q8_0 on GPUs with compute
// capability 8.0.
#pragma once

#include <memory>

#include "ggml-backend.h"

namespace pydiffusion {

// Lets a CUDA backend use them where they apply, until the result is destroyed. Null if the GPU can't run
// them.
std::shared_ptr<void> use_expert_kernels(ggml_backend_t backend);

}  // namespace pydiffusion
