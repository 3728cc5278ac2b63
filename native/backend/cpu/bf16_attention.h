// Attention of all tokens to all tokens with AVX-512 BF16 dot products, for vision towers.
#pragma once

#include "ggml.h"

namespace pydiffusion {
namespace gemm {

// By the head size, and whether this build has the instructions; the CPU must have them too.
bool can_attend_all(const ggml_tensor* q);

// softmax(q . k) v, unscaled: q, k and v F32 [head_dim, n_head, n_tokens] -> F32 [head_dim * n_head,
// n_tokens]. Q, K, V and the weights are rounded to bfloat16; sums are float32.
ggml_tensor* attend_all(ggml_context* ctx, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v);

}  // namespace gemm
}  // namespace pydiffusion
