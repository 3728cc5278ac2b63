#include "backend/cuda/compute_capability.h"
#include "ggml-cuda/common.cuh"

namespace pydiffusion {

int compute_capability(ggml_backend_dev_t gpu) {
    ggml_backend_reg_t all = ggml_backend_dev_backend_reg(gpu);
    for (int i = 0; i < ggml_cuda_info().device_count; ++i) {
        if (ggml_backend_reg_dev_get(all, i) == gpu) return ggml_cuda_info().devices[i].cc;
    }
    return 0;
}

}  // namespace pydiffusion
