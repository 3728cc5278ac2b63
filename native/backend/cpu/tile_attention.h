// Attention of tiles: the scores and the weighted values as products of 16-bit tiles.
#pragma once

#include "ggml.h"

namespace pydiffusion {
namespace gemm {

// Keys and values that are float32 stay with the float32 attention.
bool can_attend(ggml_type type, int64_t head_dim);

// As a node's function; see attend() of attention.h. Every factor is split into two bfloat16 numbers, and of
// the four products of the halves the three larger ones are added up, which leaves errors of about 2**-16.
void attend_op(ggml_tensor* dst, int ith, int nth, void* userdata);

}  // namespace gemm
}  // namespace pydiffusion
