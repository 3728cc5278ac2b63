// Self-conditioning: the last step's distribution as a mean of embeddings, two graph nodes.
#pragma once

#include "backend/step_state.h"
#include "ggml.h"

namespace pydiffusion {

// In place: the logits [n_vocab, n_tokens] of the step before become probabilities. Of each token's, the
// smallest are left out (set to 0) as far as they weigh at most state->dropped_mass together; the norm that
// follows makes it unnecessary to scale the rest.
ggml_tensor* soft_probabilities(ggml_context* ctx, ggml_tensor* logits, StepState* state);

// sum over v of probabilities[v, t] * embedding[:, v], times state->embedding_scale -> [d, n_tokens];
// straight from the embedding's quantized rows, no transposed copy. Of the vocabulary, tile by tile, only the
// rows with mass are gathered where they are few; where they are many it is a dense product.
ggml_tensor* soft_embedding(ggml_context* ctx, ggml_tensor* probabilities, ggml_tensor* embedding,
                            StepState* state);

}  // namespace pydiffusion
