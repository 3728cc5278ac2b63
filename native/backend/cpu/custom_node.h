// What identifies a custom node: the function that computes it on the CPU.
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

inline bool is_custom_node_of(const ggml_tensor* node, ggml_custom_op_t function) {
    return node->op == GGML_OP_CUSTOM && custom_parameters(node).fun == function;
}

}  // namespace pydiffusion
