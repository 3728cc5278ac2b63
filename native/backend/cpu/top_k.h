// The MoE router as graph nodes.
#pragma once

#include <cstdint>

#include "ggml.h"

namespace pydiffusion {

// Indices of the k largest entries of each row of values [n, n_rows], largest first -> I32 [k, n_rows]. Ties
// are in index order; NaN compares as -infinity. (ggml sorts with a comparison that is inconsistent for NaN,
// and may then access memory outside the row.)
ggml_tensor* top_k(ggml_context* ctx, ggml_tensor* values, int64_t k);
bool is_top_k(const ggml_tensor* node);

// Scores of experts, weights [d, n_experts] times x [d, n_tokens], all F32, and top_k() of them, in one node.
struct Routed {
    ggml_tensor *scores, *chosen;  // [n_experts, n_tokens], I32 [k, n_tokens]
};
Routed route(ggml_context* ctx, ggml_tensor* weights, ggml_tensor* x, int64_t k);
bool is_route(const ggml_tensor* node);
// Where its parts begin, in bytes from its data: scores, chosen, and scratch memory for devices. And k.
struct RoutedParts {
    int64_t chosen, scratch, end, k;
};
RoutedParts parts_of_route(const ggml_tensor* node);

}  // namespace pydiffusion
