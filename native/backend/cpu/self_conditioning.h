// Self-conditioning on the CPU: the previous step's distribution as a mean of embeddings, in two graph nodes.
#pragma once

#include "ggml.h"
#include "sampler/step_state.h"

namespace pydiffusion {

// Turns the previous step's logits [n_vocab, n_tokens] into probabilities in place. Sets each token's
// smallest ones, which sum to at most state->dropped_mass, to 0; the RMS norm that follows makes
// renormalizing unnecessary.
ggml_tensor* soft_probabilities(ggml_context* ctx, ggml_tensor* logits, StepState* state);

// sum over v of probabilities[v, t] * embedding[:, v], times state->embedding_scale -> [d, n_tokens]. Reads
// the quantized embedding without a transposed copy. Block by block of the vocabulary, gathers the rows with
// nonzero probabilities if they are few, else runs a dense GEMM.
ggml_tensor* soft_embedding(ggml_context* ctx, ggml_tensor* probabilities, ggml_tensor* embedding,
                            StepState* state);
bool is_soft_embedding(const ggml_tensor* node);

}  // namespace pydiffusion
