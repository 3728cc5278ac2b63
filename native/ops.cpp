#include "ops.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "vector_math.h"

namespace pydiffusion {

namespace {

const float* row(const ggml_tensor* t, int64_t i1, int64_t i2, int64_t i3) {
    return reinterpret_cast<const float*>(static_cast<const char*>(t->data) + i1 * t->nb[1] + i2 * t->nb[2] +
                                          i3 * t->nb[3]);
}

float* row(ggml_tensor* t, int64_t i1, int64_t i2 = 0, int64_t i3 = 0) {
    return const_cast<float*>(row(static_cast<const ggml_tensor*>(t), i1, i2, i3));
}

// --- gated GELU ---

// gelu_tanh(x) = x / 2 * (1 + tanh(y)) = x / (1 + exp(-2 y)), with y = sqrt(2 / pi) * (x + 0.044715 x^3).
void gated_gelu_row(float* out, const float* gate, const float* up, int64_t n) {
    constexpr float a = -2.0f * 0.79788456080286535588f, b = a * 0.044715f;
    for (int64_t i = 0; i < n; ++i) {
        const float x = gate[i];
        out[i] = x / (1.0f + vector_exp(x * (a + b * x * x))) * up[i];
    }
}

void gated_gelu_op(ggml_tensor* dst, const ggml_tensor* gate, const ggml_tensor* up, int ith, int nth,
                   void*) {
    const int64_t n_rows = ggml_nrows(dst);
    for (int64_t r = ith; r < n_rows; r += nth) {
        const int64_t i1 = r % dst->ne[1], i2 = r / dst->ne[1] % dst->ne[2], i3 = r / dst->ne[1] / dst->ne[2];
        gated_gelu_row(row(dst, i1, i2, i3), row(gate, i1, i2, i3), row(up, i1, i2, i3), dst->ne[0]);
    }
}

// --- RMS norm ---

// Sums of squares in as many lanes as keep the processor busy, in a fixed order.
float mean_square(const float* x, int64_t n) {
    constexpr int64_t kLanes = 64;
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] += x[i + l] * x[i + l];
    }
    for (; i < n; ++i) lanes[i % kLanes] += x[i] * x[i];
    double sum = 0.0;
    for (const float lane : lanes) sum += lane;
    return static_cast<float>(sum / static_cast<double>(n));
}

void rms_norm_op(ggml_tensor* dst, int ith, int nth, void* userdata) {
    const ggml_tensor *x = dst->src[0], *weight = dst->src[1];
    const float eps = *static_cast<const float*>(userdata);
    const float* w = weight ? static_cast<const float*>(weight->data) : nullptr;
    const int64_t n = dst->ne[0];
    for (int64_t r = ith; r < ggml_nrows(dst); r += nth) {
        const int64_t i1 = r % dst->ne[1], i2 = r / dst->ne[1] % dst->ne[2], i3 = r / dst->ne[1] / dst->ne[2];
        const float* from = row(x, i1, i2, i3);
        float* to = row(dst, i1, i2, i3);
        const float scale = 1.0f / std::sqrt(mean_square(from, n) + eps);
        if (w) {
            for (int64_t i = 0; i < n; ++i) to[i] = from[i] * scale * w[i];
        } else {
            for (int64_t i = 0; i < n; ++i) to[i] = from[i] * scale;
        }
    }
}

// --- the best of each row ---

// Keeps the best so far in order: a row has hundreds of entries and few are wanted.
void best_of_row(int32_t* best, const float* values, int64_t n, int64_t k) {
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

void best_rows_op(ggml_tensor* dst, int ith, int nth, void*) {
    const ggml_tensor* values = dst->src[0];
    for (int64_t r = ith; r < dst->ne[1]; r += nth) {
        auto* best = reinterpret_cast<int32_t*>(static_cast<char*>(dst->data) + r * dst->nb[1]);
        best_of_row(best, row(values, r, 0, 0), values->ne[0], dst->ne[0]);
    }
}

// --- experts ---

void weighted_sum_op(ggml_tensor* dst, int ith, int nth, void*) {
    const ggml_tensor *x = dst->src[0], *weights = dst->src[1];
    for (int64_t t = ith; t < dst->ne[1]; t += nth) {
        float* sum = row(dst, t);
        const float* w = row(weights, t, 0, 0);
        std::fill_n(sum, dst->ne[0], 0.0f);
        for (int64_t i = 0; i < x->ne[1]; ++i) {
            const float* values = row(x, i, t, 0);
            for (int64_t c = 0; c < dst->ne[0]; ++c) sum[c] += w[i] * values[c];
        }
    }
}

// --- logits ---

void cap_and_measure_op(ggml_tensor* dst, const ggml_tensor*, int ith, int nth, void* userdata) {
    auto* state = static_cast<StepState*>(userdata);
    for (int64_t t = ith; t < dst->ne[1]; t += nth) {
        state->measures[t] = cap_and_measure_row(row(dst, t), dst->ne[0], state->soft_cap, state->temperature,
                                                 state->u[t], &state->normalizers[t]);
    }
}

}  // namespace

ggml_tensor* gated_gelu(ggml_context* ctx, ggml_tensor* gate, ggml_tensor* up) {
    return ggml_map_custom2(ctx, gate, up, gated_gelu_op, GGML_N_TASKS_MAX, nullptr);
}

ggml_tensor* rms_norm(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weight, const float* eps) {
    ggml_tensor* sources[] = {x, weight};
    ggml_tensor* normed =
        ggml_custom_4d(ctx, GGML_TYPE_F32, x->ne[0], x->ne[1], x->ne[2], x->ne[3], sources, weight ? 2 : 1,
                       rms_norm_op, GGML_N_TASKS_MAX, const_cast<float*>(eps));
    return ggml_set_name(normed, "rms_norm");
}

ggml_tensor* best_rows(ggml_context* ctx, ggml_tensor* values, int64_t k) {
    ggml_tensor* best = ggml_custom_4d(ctx, GGML_TYPE_I32, k, values->ne[1], 1, 1, &values, 1, best_rows_op,
                                       GGML_N_TASKS_MAX, nullptr);
    return ggml_set_name(best, "best_rows");
}

ggml_tensor* weighted_sum(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weights) {
    ggml_tensor* sources[] = {x, weights};
    ggml_tensor* sum = ggml_custom_4d(ctx, GGML_TYPE_F32, x->ne[0], x->ne[2], 1, 1, sources, 2,
                                      weighted_sum_op, GGML_N_TASKS_MAX, nullptr);
    return ggml_set_name(sum, "weighted_sum");
}

ggml_tensor* cap_and_measure(ggml_context* ctx, ggml_tensor* logits, StepState* state) {
    return ggml_map_custom1_inplace(ctx, logits, cap_and_measure_op, GGML_N_TASKS_MAX, state);
}

}  // namespace pydiffusion
