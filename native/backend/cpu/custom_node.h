// Custom nodes: what identifies one, the function that computes it on the CPU, and how it is split.
#pragma once

#include <cstring>

#include "ggml-impl.h"

namespace pydiffusion {

// Function, number of tasks and user data; the node's op must be GGML_OP_CUSTOM.
inline ggml_custom_op_params custom_parameters(const ggml_tensor* node) {
    ggml_custom_op_params parameters;
    std::memcpy(&parameters, node->op_params, sizeof parameters);
    return parameters;
}

// The thread pool calls that function with ith = 0, ..., nth - 1 in any order, for pieces of the node: small
// enough that the last one is soon done, large enough that what is done once per piece does not show.
constexpr int kPiecesPerThread = 8;
// For nodes whose work depends on how many pieces it is split into.
inline int n_threads_for(int nth) { return (nth + kPiecesPerThread - 1) / kPiecesPerThread; }

inline bool is_custom_node_of(const ggml_tensor* node, ggml_custom_op_t function) {
    return node->op == GGML_OP_CUSTOM && custom_parameters(node).fun == function;
}

}  // namespace pydiffusion
