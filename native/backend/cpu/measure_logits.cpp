#include "backend/cpu/measure_logits.h"

namespace pydiffusion {

namespace {

float* row(const ggml_tensor* t, int64_t i) {
    return reinterpret_cast<float*>(static_cast<char*>(t->data) + i * t->nb[1]);
}

void cap_and_measure_op(ggml_tensor* dst, int ith, int nth, void* userdata) {
    auto* state = static_cast<StepState*>(userdata);
    const int64_t n_tokens = dst->ne[1];
    for (int64_t t = n_tokens * ith / nth; t < n_tokens * (ith + 1) / nth; ++t) {
        state->measures[t] = cap_and_measure_row(row(dst, t), dst->ne[0], state->soft_cap, state->temperature,
                                                 state->u[t], &state->normalizers[t]);
    }
}

}  // namespace

ggml_tensor* cap_and_measure(ggml_context* ctx, ggml_tensor* logits, StepState* state) {
    ggml_tensor* capped =
        ggml_custom_inplace(ctx, logits, nullptr, 0, cap_and_measure_op, GGML_N_TASKS_MAX, state);
    return ggml_set_name(capped, "cap_and_measure");
}

}  // namespace pydiffusion
