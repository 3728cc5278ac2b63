// Graph nodes of our own, for what ggml's CPU backend has not, or only through 16-bit tables.
#pragma once

#include <cstdint>

#include "backend/step_state.h"
#include "ggml.h"

namespace pydiffusion {

// The indices of the k largest entries of each row of values [n, n_rows], best first -> I32 [k, n_rows]. Of
// equal entries the first comes first; NaN counts as least. (ggml sorts with a comparison that NaN breaks,
// and then reads and writes beyond the row.)
ggml_tensor* best_rows(ggml_context* ctx, ggml_tensor* values, int64_t k);

// In place: caps the logits [n_vocab, n_tokens] and measures each position into state->measures.
ggml_tensor* cap_and_measure(ggml_context* ctx, ggml_tensor* logits, StepState* state);

}  // namespace pydiffusion
