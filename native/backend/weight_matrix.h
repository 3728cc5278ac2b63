// WeightMatrix: a matrix of weights that activations are multiplied with.
#pragma once

#include "ggml.h"

namespace pydiffusion {

// Results of matmuls with it are multiplied by its scale, which NVFP4 files have: their blocks' own scales
// reach too few magnitudes. Ops::matmul does so; whatever takes the tensor by itself must.
struct WeightMatrix {
    ggml_tensor* tensor = nullptr;  // null: the model has no such matrix
    float scale = 1.0f;

    explicit operator bool() const { return tensor != nullptr; }
};

}  // namespace pydiffusion
