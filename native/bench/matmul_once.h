// A single matmul outside any model, for benchmarks and parity tests.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ggml.h"

namespace pydiffusion {
namespace gemm {

struct MatmulTask {
    std::string device = "cpu", kernels = "auto";  // see Backend
    int n_threads = 1;
    ggml_type type = GGML_TYPE_F32;
    int64_t n_inner = 0, n_rows = 0, n_activations = 0;
    const void* weights = nullptr;  // [n_rows] rows of n_inner weights
    const float* x = nullptr;       // [n_activations][n_inner]
    // Expert matmul: the rows are those of n_experts matrices, of which each activation uses n_used.
    const int32_t* experts = nullptr;  // [n_activations][n_used]
    int64_t n_experts = 1, n_used = 1;
};

// -> [n_activations][n_rows], or [n_activations][n_used][n_rows / n_experts]
std::vector<float> matmul_once(const MatmulTask& task);

}  // namespace gemm
}  // namespace pydiffusion
