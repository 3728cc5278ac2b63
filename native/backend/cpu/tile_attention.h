// Attention with AMX: both matmuls, Q K^T and weights V, as bfloat16 tile GEMMs.
#pragma once

#include "ggml.h"

namespace pydiffusion {
namespace gemm {

// False for a float32 cache, which keeps the float32 attention.
bool can_attend(ggml_type type, int64_t head_dim);

// Op of the node that attend() of attention.h builds. Each operand is split into two bfloat16 halves, and the
// three larger of the four products of halves are summed, for a relative error of about 2^-16.
void attend_op(ggml_tensor* dst, int ith, int nth, void* userdata);

}  // namespace gemm
}  // namespace pydiffusion
