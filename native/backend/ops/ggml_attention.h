// Attention from ggml's own operations, for any device, and its masks.
#pragma once

#include <vector>

#include "backend/backend.h"
#include "backend/cpu/attention.h"

namespace pydiffusion::ggml_ops {

// Attention mask, added to the scores: an input of the graph.
struct Mask {
    // F16 [n_rows, n_tokens]; rows from n_visible on are padding. Null: every token sees every row.
    ggml_tensor* tensor;
    int64_t n_visible;
    const Causal* causal;  // null: every token sees every visible row
};

// Rows are padded to a multiple of this: CUDA's flash attention uses its grouped-query kernels only then.
constexpr int64_t kMaskPadding = 256;

inline int64_t pad_to_mask(int64_t n_rows) {
    return (n_rows + kMaskPadding - 1) / kMaskPadding * kMaskPadding;
}

void fill(const Mask& mask);  // after the graph is allocated

// Like pydiffusion::attend; k and v have the mask's rows. Uses flash attention if the device has it for this
// head size and cache type, else attend_by_matmul, which also keeps a float32 cache exact.
ggml_tensor* attend(ggml_context* ctx, const Backend& backend, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                    const Mask& mask);

// The same as two matmuls with a softmax between, with float32 sums; for any device and cache type.
ggml_tensor* attend_by_matmul(ggml_context* ctx, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                              const Mask& mask);

}  // namespace pydiffusion::ggml_ops
