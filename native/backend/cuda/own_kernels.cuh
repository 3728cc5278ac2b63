// Launches of our kernels, for the hooks of ggml's CUDA backend (vendor/patches/0003 and 0005).
#pragma once

#include "ggml-cuda/common.cuh"

typedef bool (*ggml_cuda_custom_hook_t)(ggml_backend_cuda_context* ctx, ggml_tensor* dst);
extern std::atomic<ggml_cuda_custom_hook_t> ggml_cuda_custom_hook;  // in ggml-cuda.cu

namespace pydiffusion {

// Whether the device has code of the expert matmuls and room for so many of their blocks on a multiprocessor.
bool can_multiply_experts(int device, int n_blocks);

// Computes dst, as ggml_mul_mat_id would, if there is a kernel for the operands; else returns false.
bool multiply_experts(ggml_backend_cuda_context& ctx, const ggml_tensor* weights, const ggml_tensor* x,
                      const ggml_tensor* ids, ggml_tensor* dst);

// Whether there is a kernel for a custom node; launches it unless ctx is null.
bool compute_custom_node(ggml_backend_cuda_context* ctx, ggml_tensor* node);

}  // namespace pydiffusion
