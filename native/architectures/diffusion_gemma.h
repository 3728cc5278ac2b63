// DiffusionGemma's transformer layer, shared by encoder and denoiser, which differ only in embedding, mask,
// layer scale and use of the cache.
#pragma once

#include <cstdint>

#include "backend/cpu/attention.h"
#include "graph/graph_builder.h"

namespace pydiffusion {

enum class Mode { encoder, decoder };

// Writes the layer's K and V of x [d, n_tokens] to the rows after each sequence's cache.
void store_keys_and_values(GraphBuilder& g, int32_t i_layer, ggml_tensor* x);

// One layer, x [d, n_tokens] -> [d, n_tokens]: stores K and V, then attends over the visible rows of the
// caches, causally unless `causal` is null.
ggml_tensor* apply_layer(GraphBuilder& g, int32_t i_layer, Mode mode, ggml_tensor* x, const Causal* causal);

}  // namespace pydiffusion
