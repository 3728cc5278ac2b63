#include "backend/ggml/ggml_ops.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace pydiffusion::ggml_ops {

void fill(const Mask& mask) {
    const int64_t n_rows = mask.tensor->ne[0], n_tokens = mask.tensor->ne[1];
    const ggml_fp16_t visible = ggml_fp32_to_fp16(0.0f),
                      hidden = ggml_fp32_to_fp16(-std::numeric_limits<float>::infinity());
    std::vector<ggml_fp16_t> values(n_rows * n_tokens, hidden);
    for (int64_t t = 0; t < n_tokens; ++t) {
        int64_t first = 0, end = mask.n_visible;
        if (mask.causal) {
            const int64_t own_row =
                mask.causal->token_position + t - mask.causal->row_position;  // row of token t
            first = std::max<int64_t>(0, own_row - mask.causal->window + 1);
            end = std::min(end, own_row + 1);
        }
        if (first < end) std::fill_n(values.begin() + t * n_rows + first, end - first, visible);
    }
    ggml_backend_tensor_set(mask.tensor, values.data(), 0, values.size() * sizeof(ggml_fp16_t));
}

namespace {

// Concatenates the heads of a contiguous result -> [head_dim * n_head, n_tokens].
ggml_tensor* concat_heads(ggml_context* ctx, ggml_tensor* result, const ggml_tensor* q) {
    return ggml_reshape_2d(ctx, result, q->ne[0] * q->ne[1], q->ne[2]);
}

}  // namespace

ggml_tensor* attend_by_matmul(ggml_context* ctx, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                              const Mask& mask) {
    if (ggml_is_quantized(k->type)) {  // ggml has no matmul with quantized rows of a non-contiguous view
        k = ggml_cast(ctx, k, GGML_TYPE_F32);
        v = ggml_cast(ctx, v, GGML_TYPE_F32);
    }
    ggml_tensor* scores =
        ggml_mul_mat(ctx, k, ggml_permute(ctx, q, 0, 2, 1, 3));  // [n_rows, n_tokens, n_head]
    ggml_prec_set_acc(scores, GGML_PREC_F32);
    ggml_tensor* weights = ggml_soft_max_ext(ctx, scores, mask.tensor, 1.0f, 0.0f);
    ggml_tensor* values = ggml_cont(ctx, ggml_transpose(ctx, v));  // [n_rows, head_dim, n_head_kv]
    ggml_tensor* result = ggml_mul_mat(ctx, values, weights);      // [head_dim, n_tokens, n_head]
    ggml_prec_set_acc(result, GGML_PREC_F32);
    return concat_heads(ctx, ggml_cont(ctx, ggml_permute(ctx, result, 0, 2, 1, 3)), q);
}

ggml_tensor* attend(ggml_context* ctx, const Backend& backend, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                    const Mask& mask) {
    if (k->type != GGML_TYPE_F32) {
        ggml_tensor* result =
            ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), k, v, mask.tensor, 1.0f, 0.0f, 0.0f);
        ggml_prec_set_acc(result, GGML_PREC_F32);
        if (backend.device_supports(result)) return concat_heads(ctx, result, q);
    }
    return attend_by_matmul(ctx, q, k, v, mask);
}

ggml_tensor* gated_gelu(ggml_context* ctx, ggml_tensor* gate, ggml_tensor* up) {
    return ggml_geglu_split(ctx, gate, up);
}

Routing route(ggml_context* ctx, ggml_cgraph* graph, ggml_tensor* probabilities, ggml_tensor* scale,
              int64_t n_used) {
    const int64_t n_expert = probabilities->ne[0], n_tokens = probabilities->ne[1];
    ggml_tensor* rows = ggml_reshape_3d(ctx, probabilities, 1, n_expert, n_tokens);
    ggml_tensor* experts = ggml_argsort_top_k(ctx, probabilities, static_cast<int>(n_used));
    ggml_tensor* chosen = ggml_reshape_2d(ctx, ggml_get_rows(ctx, rows, experts), n_used, n_tokens);
    // The clamp never applies, as sums are at least 1 / n_expert; it is part of the pattern that ggml fuses.
    ggml_tensor* total = ggml_clamp(ctx, ggml_sum_rows(ctx, chosen), 6.103515625e-5f, INFINITY);
    ggml_tensor* weights = ggml_reshape_3d(ctx, ggml_div(ctx, chosen, total), 1, n_used, n_tokens);
    ggml_build_forward_expand(graph, weights);

    ggml_tensor* scales = ggml_reshape_3d(ctx, scale, 1, n_expert, 1);
    scales = ggml_repeat_4d(ctx, scales, 1, n_expert, n_tokens, 1);
    return {experts, weights, ggml_get_rows(ctx, scales, experts)};
}

ggml_tensor* weighted_sum(ggml_context* ctx, ggml_cgraph* graph, ggml_tensor* y, const Routing& routing) {
    ggml_build_forward_expand(graph, y);
    ggml_build_forward_expand(graph, routing.scales);
    y = ggml_mul(ctx, ggml_mul(ctx, y, routing.scales), routing.weights);
    ggml_build_forward_expand(graph, y);
    std::vector<ggml_tensor*> parts;
    for (int64_t i = 0; i < y->ne[1]; ++i) {
        parts.push_back(ggml_view_2d(ctx, y, y->ne[0], y->ne[2], y->nb[2], i * y->nb[1]));
        ggml_build_forward_expand(graph, parts.back());
    }
    ggml_tensor* sum = parts[0];
    for (size_t i = 1; i < parts.size(); ++i) {
        sum = ggml_add(ctx, sum, parts[i]);
        ggml_build_forward_expand(graph, sum);
    }
    return parts.size() == 1 ? ggml_cont(ctx, sum) : sum;
}

}  // namespace pydiffusion::ggml_ops
