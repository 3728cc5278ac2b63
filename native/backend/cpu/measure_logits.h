// Soft cap and sampling statistics of the logits as the last graph node of a step.
#pragma once

#include "ggml.h"
#include "sampler/step_state.h"

namespace pydiffusion {

// Caps the logits [n_vocab, n_tokens] in place and writes state->measures and state->normalizers.
ggml_tensor* cap_and_measure(ggml_context* ctx, ggml_tensor* logits, StepState* state);

}  // namespace pydiffusion
