// Nodes that make each row of theirs from the rows of the same token: what lies between two products of a
// layer, in as few passes over memory as can be. For the processor.
//
// Threads take whole ranges of tokens, the same in every such node, so that a row is still in the cache of
// the core that made it when the next node reads it.
#pragma once

#include <cstdint>
#include <vector>

#include "ggml.h"

namespace pydiffusion {

// gelu_tanh(gate) * up, elementwise; same shape, rows contiguous. Exact to float rounding, where ggml's CPU
// GELU goes through a float16 table.
ggml_tensor* gated_gelu(ggml_context* ctx, ggml_tensor* gate, ggml_tensor* up);

// x / sqrt(mean of squares of its row + *eps), times weight [ne0] unless that is null. Rows of x are
// contiguous; *eps must live as long as the graph, here and below. ggml's adds the squares up one by one.
ggml_tensor* rms_norm(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weight, const float* eps);

// x + rms_norm(branch, weight), all [d, n_tokens]
ggml_tensor* add_normed(ggml_context* ctx, ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight,
                        const float* eps);

// The end of a layer, [d, n_tokens]:
// (x + rms_norm(rms_norm(dense, dense_norm) + rms_norm(mixture, mixture_norm), norm)) * scale, where
// mixture[:, t] is the sum over i of w[i] * expert_scales[chosen[i, t]] * experts[:, i, t], and w the softmax
// of the chosen experts' scores / sqrt(d).
struct Branches {
    ggml_tensor *dense, *dense_norm;           // [d, n_tokens], [d]
    ggml_tensor* experts;                      // [d, n_used, n_tokens], what the chosen ones gave
    ggml_tensor *scores, *chosen;              // [n_expert, n_tokens], I32 [n_used, n_tokens] best first
    ggml_tensor* expert_scales;                // [n_expert]
    ggml_tensor *mixture_norm, *norm, *scale;  // [d], [d], [1]
};
ggml_tensor* join_branches(ggml_context* ctx, ggml_tensor* x, const Branches& branches, const float* eps);

// rms_norm(x, weight), then rotated: number i of a head and number i + head_dim / 2 by the angle whose cosine
// and sine stand at the same places of the token's row of `angles`. x [head_dim, n_heads, n_tokens],
// contiguous; angles [head_dim, n_tokens].
ggml_tensor* rotate_normed(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weight, ggml_tensor* angles,
                           const float* eps);

// Tokens of several sequences side by side: parts [d, n_i] -> [d, sum of n_i].
ggml_tensor* stack_tokens(ggml_context* ctx, std::vector<ggml_tensor*> parts);

// Makes row (i1, i2) of a node, from the data of its sources: for whoever reads each row once and wants no
// node for it. Null where the node is none of ours of which that can be had.
using MakeRow = void (*)(const ggml_tensor* node, int64_t i1, int64_t i2, float* row);
MakeRow row_maker_of(const ggml_tensor* node);
// What a node that makes or reads x's rows depends on: x's own sources where its rows can be made, else x.
void append_sources(std::vector<ggml_tensor*>& sources, ggml_tensor* x);

}  // namespace pydiffusion
