// What ops.h and attention.h do, put together from ggml's own operations, which every backend has; in the
// order of nodes that its CUDA backend fuses.
#pragma once

#include <vector>

#include "backend/backend.h"
#include "backend/cpu/attention.h"

namespace pydiffusion::ggml_ops {

// Which rows each token may see, as numbers that are added to the attention scores: an input of the graph.
struct Mask {
    ggml_tensor* tensor;  // F16 [n_rows, n_tokens]; rows behind n_visible only fill up
    int64_t n_visible;
    const Causal* causal;  // null: every token sees every visible row
};

// Rows come in multiples of this, for CUDA's attention shares keys among heads only then.
constexpr int64_t kMaskPadding = 256;

inline int64_t pad_to_mask(int64_t n_rows) {
    return (n_rows + kMaskPadding - 1) / kMaskPadding * kMaskPadding;
}

void fill(const Mask& mask);  // once the graph has its memory

// As pydiffusion::attend, k and v with the rows that the mask has: by the device's flash attention, where it
// has one for these heads and this type of cache, else by products. A cache of float32 stays exact: by
// products.
ggml_tensor* attend(ggml_context* ctx, const Backend& backend, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                    const Mask& mask);

// The same as two products and a softmax in between, with float32 sums; of any device and type.
ggml_tensor* attend_by_matmul(ggml_context* ctx, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                              const Mask& mask);

ggml_tensor* gated_gelu(ggml_context* ctx, ggml_tensor* gate, ggml_tensor* up);

struct Routing {
    ggml_tensor* experts;  // I32 [n_used, n_tokens]
    ggml_tensor* weights;  // F32 [1, n_used, n_tokens], summing to 1
    ggml_tensor* scales;   // F32 [1, n_used, n_tokens], the experts' own
};

// probabilities [n_expert, n_tokens], scale [n_expert]
Routing route(ggml_context* ctx, ggml_cgraph* graph, ggml_tensor* probabilities, ggml_tensor* scale,
              int64_t n_used);

// y [d, n_used, n_tokens] -> [d, n_tokens]
ggml_tensor* weighted_sum(ggml_context* ctx, ggml_cgraph* graph, ggml_tensor* y, const Routing& routing);

}  // namespace pydiffusion::ggml_ops
