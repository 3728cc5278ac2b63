// A float32 tensor of ggml's with memory of its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ggml-cpp.h"
#include "ggml.h"

namespace pydiffusion {
namespace testing {

struct Matrix {
    Matrix(int64_t n, int64_t n_rows, const std::vector<float>& values)
        : context(ggml_init({ggml_tensor_overhead() + 4 * values.size() + 64, nullptr, false})),
          tensor(ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, n, n_rows)) {
        std::copy(values.begin(), values.end(), data());
    }
    float* data() const { return ggml_get_data_f32(tensor); }

    ggml_context_ptr context;
    ggml_tensor* tensor;
};

}  // namespace testing
}  // namespace pydiffusion
