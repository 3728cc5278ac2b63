// An MLP as one node that a device computes beside the nodes after it, up to join_branches, which waits for
// it: most of these are too small to fill a GPU.
#pragma once

#include "ggml.h"

namespace pydiffusion {

// down * (gelu(gate * h) * (up * h)) with h = rms_norm(x, norm), or h = x, BF16, if norm is null: x F32 [d,
// n_tokens], gate_up BF16 [d, 2 * n_ff] (gate, then up), down BF16 [n_ff, d] -> F32 [d, n_tokens]. Only for
// devices where Backend::computes_mlp_beside(); x must be in memory that join_branches keeps by needing it
// too.
ggml_tensor* mlp_beside(ggml_context* ctx, ggml_tensor* x, ggml_tensor* norm, ggml_tensor* gate_up,
                        ggml_tensor* down, const float* eps);
bool is_mlp_beside(const ggml_tensor* node);

// Where the node's intermediate results are, in bytes from its data: after its result [d, n_tokens].
struct MlpScratch {
    int64_t normed;      // BF16 [d, n_tokens], unless x is normed
    int64_t both;        // F32 [2 * n_ff, n_tokens]
    int64_t activation;  // BF16 [n_ff, n_tokens]
    int64_t end;
};
MlpScratch mlp_scratch(int64_t d, int64_t n_ff, int64_t n_tokens);

}  // namespace pydiffusion
