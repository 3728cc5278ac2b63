// Nodes of low-rank changes: their parameters, which are words of op_params after ggml's own.
#pragma once

#include "backend/cpu/custom_node.h"

namespace pydiffusion {
namespace low_rank {

enum Parameter { kFirst, kCount, kScale };  // the change's tokens; of a's results

inline int32_t word_of(Parameter parameter) {
    return static_cast<int32_t>(sizeof(ggml_custom_op_params) / sizeof(int32_t)) + parameter;
}

inline void set_tokens(ggml_tensor* node, int64_t first, int64_t n) {
    ggml_set_op_params_i32(node, word_of(kFirst), static_cast<int32_t>(first));
    ggml_set_op_params_i32(node, word_of(kCount), static_cast<int32_t>(n));
}
inline int64_t first_of(const ggml_tensor* node) { return ggml_get_op_params_i32(node, word_of(kFirst)); }
inline int64_t count_of(const ggml_tensor* node) { return ggml_get_op_params_i32(node, word_of(kCount)); }

inline void set_scale(ggml_tensor* node, float scale) {
    ggml_set_op_params_f32(node, word_of(kScale), scale);
}
inline float scale_of(const ggml_tensor* node) { return ggml_get_op_params_f32(node, word_of(kScale)); }

// Names of nodes with a and with b begin so; of experts they end so.
constexpr char kInner[] = "low_rank_inner", kOuter[] = "add_low_rank", kOfExperts[] = "_experts";

}  // namespace low_rank
}  // namespace pydiffusion
