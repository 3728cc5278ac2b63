// Compute capability of ggml's CUDA devices.
#pragma once

#include "ggml-backend.h"

namespace pydiffusion {

// 100 times the major plus 10 times the minor number: 900 for an H100.
int compute_capability(ggml_backend_dev_t gpu);

}  // namespace pydiffusion
