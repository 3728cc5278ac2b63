#include "backend/cpu/top_k.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "backend/cpu/custom_node.h"

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

}  // namespace

ggml_tensor* top_k(ggml_context* ctx, ggml_tensor* values, int64_t k) {
    ggml_tensor* best = ggml_custom_4d(ctx, GGML_TYPE_I32, k, values->ne[1], 1, 1, &values, 1, top_k_op,
                                       GGML_N_TASKS_MAX, nullptr);
    return ggml_set_name(best, "top_k");
}

bool is_top_k(const ggml_tensor* node) { return is_custom_node_of(node, top_k_op); }

}  // namespace pydiffusion
