#include "backend/ops/ggml_attention.h"

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
            const Causal::Rows rows = mask.causal->visible(static_cast<int32_t>(t));
            first = rows.first;
            end = std::min<int64_t>(end, rows.last + 1);
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

}  // namespace pydiffusion::ggml_ops
