// DiffusionGemma's layer, which encoder and denoiser share. They differ in embedding, mask, scalar and use of
// the cache only.
#pragma once

#include <cstdint>

#include "backend/cpu/attention.h"
#include "graph/graph_builder.h"

namespace pydiffusion {

enum class Mode { encoder, decoder };

// Writes the layer's keys and values of x [d, n_tokens] into the caches' rows behind what they hold.
void store_keys_and_values(GraphBuilder& g, int32_t i_layer, ggml_tensor* x);

// One layer, x [d, n_tokens] -> [d, n_tokens]; stores keys and values, then attends over what the caches'
// ranges permit and, unless it is null, `causal`.
ggml_tensor* apply_layer(GraphBuilder& g, int32_t i_layer, Mode mode, ggml_tensor* x, const Causal* causal);

}  // namespace pydiffusion
