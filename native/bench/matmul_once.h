// One product by itself, for measuring and proving what graphs are made of.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ggml.h"

namespace pydiffusion {
namespace matrix {

struct Multiplication {
    std::string kernels;  // see kernel_named()
    int n_threads = 1;
    ggml_type type = GGML_TYPE_F32;
    int64_t n_inner = 0, n_rows = 0, n_columns = 0;
    const void* weights = nullptr;  // [n_rows] rows of n_inner weights
    const float* x = nullptr;       // [n_columns][n_inner]
    // By expert: of n_experts matrices, which the rows are divided into, n_used for each column.
    const int32_t* experts = nullptr;  // [n_columns][n_used]
    int64_t n_experts = 1, n_used = 1;
};

// -> [n_columns][n_rows], or [n_columns][n_used][n_rows / n_experts]
std::vector<float> multiply_once(const Multiplication& task);

}  // namespace matrix
}  // namespace pydiffusion
