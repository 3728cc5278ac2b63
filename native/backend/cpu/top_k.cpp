#include "backend/cpu/top_k.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "backend/cpu/custom_node.h"
#include "backend/cpu/node_parts.h"
#include "backend/cpu/router_sizes.h"

namespace pydiffusion {

namespace {

float* row(const ggml_tensor* t, int64_t i) {
    return reinterpret_cast<float*>(static_cast<char*>(t->data) + i * t->nb[1]);
}

// Insertion sort of the best so far: rows have hundreds of entries, and k is small.
void top_k_of_row(int32_t* best, const float* values, int64_t n, int64_t k) {
    const auto value = [values](int64_t i) {
        return std::isnan(values[i]) ? -std::numeric_limits<float>::infinity() : values[i];
    };
    int64_t n_best = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float candidate = value(i);
        if (n_best == k && !(candidate > value(best[k - 1]))) continue;
        int64_t at = n_best < k ? n_best++ : k - 1;
        for (; at > 0 && candidate > value(best[at - 1]); --at) best[at] = best[at - 1];
        best[at] = static_cast<int32_t>(i);
    }
}

void top_k_op(ggml_tensor* dst, int ith, int nth, void*) {
    const ggml_tensor* values = dst->src[0];
    for (int64_t r = ith; r < dst->ne[1]; r += nth) {
        auto* best = reinterpret_cast<int32_t*>(static_cast<char*>(dst->data) + r * dst->nb[1]);
        top_k_of_row(best, row(values, r), values->ne[0], dst->ne[0]);
    }
}

RoutedParts parts_of(const ggml_tensor* weights, const ggml_tensor* x, int64_t k) {
    const int64_t n_experts = weights->ne[1], n_tokens = x->ne[1];
    RoutedParts parts;
    parts.k = k;
    parts.chosen = after_part(0, n_experts * n_tokens * static_cast<int64_t>(sizeof(float)));
    parts.scratch = after_part(parts.chosen, k * n_tokens * static_cast<int64_t>(sizeof(int32_t)));
    const int64_t n_scratch = router_scratch(x->ne[0], n_experts, n_tokens);
    parts.end = parts.scratch + n_scratch * static_cast<int64_t>(sizeof(float));
    return parts;
}

// In enough lanes to hide the latency of additions, in a fixed order.
float score_of(const float* x, const float* weights, int64_t d) {
    constexpr int64_t kLanes = 64;
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] += x[i + l] * weights[i + l];
    }
    for (; i < d; ++i) lanes[i % kLanes] += x[i] * weights[i];
    double sum = 0.0;
    for (const float lane : lanes) sum += lane;
    return static_cast<float>(sum);
}

void route_op(ggml_tensor* dst, int ith, int nth, void*) {
    const ggml_tensor *weights = dst->src[0], *x = dst->src[1];
    const int64_t n_experts = weights->ne[1];
    const RoutedParts parts = parts_of_route(dst);
    for (int64_t t = ith; t < x->ne[1]; t += nth) {
        float* scores = static_cast<float*>(dst->data) + t * n_experts;
        for (int64_t e = 0; e < n_experts; ++e) scores[e] = score_of(row(x, t), row(weights, e), x->ne[0]);
        auto* chosen = reinterpret_cast<int32_t*>(static_cast<char*>(dst->data) + parts.chosen) + t * parts.k;
        top_k_of_row(chosen, scores, n_experts, parts.k);
    }
}

}  // namespace

Routed route(ggml_context* ctx, ggml_tensor* weights, ggml_tensor* x, int64_t k) {
    const RoutedParts parts = parts_of(weights, x, k);
    ggml_tensor* sources[] = {weights, x};
    ggml_tensor* node =
        ggml_custom_4d(ctx, GGML_TYPE_F32, parts.end / static_cast<int64_t>(sizeof(float)), 1, 1, 1, sources,
                       2, route_op, GGML_N_TASKS_MAX, reinterpret_cast<void*>(static_cast<intptr_t>(k)));
    ggml_set_name(node, "route");
    return {view_part(ctx, node, 0, GGML_TYPE_F32, weights->ne[1], x->ne[1]),
            view_part(ctx, node, parts.chosen, GGML_TYPE_I32, k, x->ne[1])};
}

bool is_route(const ggml_tensor* node) { return is_custom_node_of(node, route_op); }

RoutedParts parts_of_route(const ggml_tensor* node) {
    const auto k = static_cast<int64_t>(reinterpret_cast<intptr_t>(custom_parameters(node).userdata));
    return parts_of(node->src[0], node->src[1], k);
}

ggml_tensor* top_k(ggml_context* ctx, ggml_tensor* values, int64_t k) {
    ggml_tensor* best = ggml_custom_4d(ctx, GGML_TYPE_I32, k, values->ne[1], 1, 1, &values, 1, top_k_op,
                                       GGML_N_TASKS_MAX, nullptr);
    return ggml_set_name(best, "top_k");
}

bool is_top_k(const ggml_tensor* node) { return is_custom_node_of(node, top_k_op); }

}  // namespace pydiffusion
