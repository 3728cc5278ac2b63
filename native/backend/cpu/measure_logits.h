// The sampler's graph node, last of a step.
#pragma once

#include "backend/step_state.h"
#include "ggml.h"

namespace pydiffusion {

// In place: caps the logits [n_vocab, n_tokens] and measures each position into state->measures.
ggml_tensor* cap_and_measure(ggml_context* ctx, ggml_tensor* logits, StepState* state);

}  // namespace pydiffusion
