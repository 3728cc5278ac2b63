#include "backend/ops/ggml_ops.h"

#include <cmath>

#include "backend/cpu/matmul.h"

namespace pydiffusion {

ggml_tensor* GgmlOps::rms_norm(ggml_tensor* x, ggml_tensor* weight, ForMatmuls) {
    ggml_tensor* normed = ggml_rms_norm(c_.ctx, x, *c_.rms_eps);
    if (!weight) return normed;
    pin(normed, weight);  // else x might be copied to another device both before and after the norm
    return ggml_mul(c_.ctx, normed, weight);
}

ggml_tensor* GgmlOps::unscaled_matmul(ggml_tensor* weight, ggml_tensor* x) {
    return gemm::ggml_matmul(c_.ctx, weight, x);
}

ggml_tensor* GgmlOps::expert_matmul(ggml_tensor* weights, ggml_tensor* x, ggml_tensor* chosen) {
    return gemm::ggml_matmul(c_.ctx, weights, x, chosen);
}

ggml_tensor* GgmlOps::gated_gelu(ggml_tensor* gate, ggml_tensor* up, ForMatmuls) {
    return ggml_geglu_split(c_.ctx, gate, up);
}

ggml_tensor* GgmlOps::concat_tokens(const std::vector<ggml_tensor*>& parts) {
    ggml_tensor* all = parts[0];
    for (size_t i = 1; i < parts.size(); ++i) all = ggml_concat(c_.ctx, all, parts[i], 1);
    return all;
}

ggml_tensor* GgmlOps::rotate(ggml_tensor* x, ggml_tensor* norm, const Rope& rope, int64_t first_token) {
    // An operation's inputs must be in the memory of its device.
    ggml_tensor*& positions = positions_[rope.device - kCpuDevice];
    if (!positions) positions = c_.inputs.add(rope.device, GGML_TYPE_I32, c_.n_tokens);
    ggml_tensor* own = ggml_view_1d(c_.ctx, positions, x->ne[2], first_token * positions->nb[0]);
    return ggml_rope_ext(c_.ctx, rms_norm(x, norm, {}), own, rope.factors, static_cast<int>(x->ne[0]),
                         GGML_ROPE_TYPE_NEOX, rope.n_ctx_train, rope.base, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
}

void GgmlOps::set_positions(const std::vector<int32_t>& positions) {
    for (ggml_tensor* on_device : positions_) {
        if (on_device)
            ggml_backend_tensor_set(on_device, positions.data(), 0, positions.size() * sizeof(int32_t));
    }
}

ggml_tensor* GgmlOps::rotate_axes(ggml_tensor* x, ggml_tensor* norm, const Rope& rope) {
    if (!axes_.x) axes_.add(c_.inputs, rope.device, c_.n_tokens);
    ggml_tensor* normed = rms_norm(x, norm, {});
    const int64_t half = x->ne[0] / 2;
    const auto rotated = [&](int64_t first, ggml_tensor* positions) {
        ggml_tensor* part = ggml_view_3d(c_.ctx, normed, half, x->ne[1], x->ne[2], normed->nb[1],
                                         normed->nb[2], first * normed->nb[0]);
        return ggml_rope_ext(c_.ctx, part, positions, nullptr, static_cast<int>(half), GGML_ROPE_TYPE_NEOX,
                             rope.n_ctx_train, rope.base, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    };
    ggml_tensor* left = rotated(0, axes_.x);
    return ggml_concat(c_.ctx, left, rotated(half, axes_.y), 0);
}

void GgmlOps::set_axial_positions(const std::vector<AxialPosition>& positions) { axes_.write(positions); }

ggml_tensor* GgmlOps::attend_all(const Heads& heads, bool exact, const WeightMatrix&) {
    const auto operand = [&](ggml_tensor* x) {
        x = tokens_of_heads(x);
        return exact ? x : ggml_cast(c_.ctx, x, GGML_TYPE_F16);
    };
    ggml_tensor* k = operand(heads.k);
    return ggml_ops::attend(c_.ctx, c_.backend, heads.q, k, operand(heads.v), {nullptr, k->ne[1], nullptr});
}

ggml_tensor* GgmlOps::limit(ggml_tensor* x, float low, float high) {
    return ggml_clamp(c_.ctx, ggml_cont(c_.ctx, x), low, high);  // in place, and others may read x
}

ggml_ops::Mask GgmlOps::mask(int64_t n_tokens, int64_t n_visible, const Causal* causal, int32_t device) {
    for (const SharedMask& shared : masks_) {
        const ggml_ops::Mask& mask = shared.mask;
        if (shared.device == device && mask.tensor->ne[1] == n_tokens && mask.n_visible == n_visible &&
            mask.causal == causal)
            return mask;
    }
    ggml_tensor* tensor = c_.inputs.add(device, GGML_TYPE_F16, ggml_ops::pad_to_mask(n_visible), n_tokens);
    masks_.push_back({device, {tensor, n_visible, causal}});
    return masks_.back().mask;
}

void GgmlOps::fill_masks() {
    for (const SharedMask& shared : masks_) ggml_ops::fill(shared.mask);
}

ggml_tensor* GgmlOps::attend(ggml_tensor* q, const CacheRows& visible, const Causal* causal, int32_t device,
                             ForMatmuls) {
    const ggml_ops::Mask shared = mask(q->ne[2], visible.n, causal, device);
    const int64_t n_rows = shared.tensor->ne[0];
    ggml_tensor* k = rows_of_heads(visible.k, q->ne[0], visible.first, n_rows);
    ggml_tensor* v = rows_of_heads(visible.v, q->ne[0], visible.first, n_rows);
    return ggml_ops::attend(c_.ctx, c_.backend, q, k, v, shared);
}

namespace {

struct Routing {
    ggml_tensor* experts;  // I32 [n_used, n_tokens]
    ggml_tensor* weights;  // F32 [1, n_used, n_tokens], summing to 1
};

// probabilities [n_expert, n_tokens]
Routing route_tokens(ggml_context* ctx, ggml_cgraph* graph, ggml_tensor* probabilities, int64_t n_used) {
    const int64_t n_expert = probabilities->ne[0], n_tokens = probabilities->ne[1];
    ggml_tensor* rows = ggml_reshape_3d(ctx, probabilities, 1, n_expert, n_tokens);
    ggml_tensor* experts = ggml_argsort_top_k(ctx, probabilities, static_cast<int>(n_used));
    ggml_tensor* chosen = ggml_reshape_2d(ctx, ggml_get_rows(ctx, rows, experts), n_used, n_tokens);
    // The clamp never applies, as sums are at least 1 / n_expert; it is part of the pattern that ggml fuses.
    ggml_tensor* total = ggml_clamp(ctx, ggml_sum_rows(ctx, chosen), 6.103515625e-5f, INFINITY);
    ggml_tensor* weights = ggml_reshape_3d(ctx, ggml_div(ctx, chosen, total), 1, n_used, n_tokens);
    ggml_build_forward_expand(graph, weights);
    return {experts, weights};
}

// y [d, n_used, n_tokens], scales [1, n_used, n_tokens] of the chosen experts -> [d, n_tokens]
ggml_tensor* weighted_sum(ggml_context* ctx, ggml_cgraph* graph, ggml_tensor* y, const Routing& routing,
                          ggml_tensor* scales) {
    ggml_build_forward_expand(graph, y);
    ggml_build_forward_expand(graph, scales);
    y = ggml_mul(ctx, ggml_mul(ctx, y, scales), routing.weights);
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

}  // namespace

Mixture GgmlOps::moe(ggml_tensor* x, const RouterChoice& choice, const ExpertWeights& w) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(x->ne[0]));
    ggml_tensor* probabilities = ggml_soft_max(c_.ctx, ggml_scale(c_.ctx, choice.scores, scale));
    const Routing routing = route_tokens(c_.ctx, c_.graph, probabilities, w.n_used);
    ggml_tensor* scales = scales_of(w.scales, routing.experts);
    if (!c_.single_device) ggml_build_forward_expand(c_.graph, scales);
    ggml_tensor* y = experts(x, routing.experts, w);
    ggml_build_forward_expand(c_.graph, y);
    // Sum the experts' outputs on the device that computes them, so that only the much smaller sum is copied.
    const int first = ggml_graph_n_nodes(c_.graph);
    ggml_tensor* sum = weighted_sum(c_.ctx, c_.graph, y, routing, scales);
    for (int i = first; i < ggml_graph_n_nodes(c_.graph); ++i) pin(ggml_graph_node(c_.graph, i), w.down);
    return {sum, nullptr, nullptr, nullptr};
}

}  // namespace pydiffusion
