#include "backend/ops/cpu_ops.h"

#include "backend/cpu/bf16_attention.h"
#include "backend/cpu/fused_rows.h"
#include "backend/cpu/top_k.h"

namespace pydiffusion {

ggml_tensor* CpuOps::rms_norm(ggml_tensor* x, ggml_tensor* weight, ForMatmuls) {
    return pydiffusion::rms_norm(c_.ctx, x, weight, c_.rms_eps);
}

ggml_tensor* CpuOps::add_normed(ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight) {
    return pydiffusion::add_normed(c_.ctx, x, branch, weight, c_.rms_eps);
}

ggml_tensor* CpuOps::gated_gelu(ggml_tensor* gate, ggml_tensor* up, ForMatmuls) {
    return pydiffusion::gated_gelu(c_.ctx, gate, up);
}

ggml_tensor* CpuOps::concat_tokens(const std::vector<ggml_tensor*>& parts) {
    return stack_tokens(c_.ctx, parts);
}

ggml_tensor* CpuOps::rotate(ggml_tensor* x, ggml_tensor* norm, const Rope& rope, int64_t first_token) {
    ggml_tensor* angles = angles_.view(rope, x->ne[0], first_token, x->ne[2]);
    return rotate_normed(c_.ctx, x, norm, angles, c_.rms_eps);
}

ggml_tensor* CpuOps::attend(ggml_tensor* q, const CacheRows& visible, const Causal* causal, int32_t,
                            ForMatmuls) {
    ggml_tensor* k = rows_of_heads(visible.k, q->ne[0], visible.first, visible.n);
    ggml_tensor* v = rows_of_heads(visible.v, q->ne[0], visible.first, visible.n);
    return pydiffusion::attend(c_.ctx, q, k, v, causal, kernel_);
}

ggml_tensor* CpuOps::rotate_axes(ggml_tensor* x, ggml_tensor* norm, const Rope& rope) {
    return pydiffusion::rotate_axes(c_.ctx, x, norm, angles_.axial(rope, x->ne[0]), c_.rms_eps);
}

ggml_tensor* CpuOps::attend_all(const Heads& heads, bool exact, const WeightMatrix& for_matmul) {
    if (!exact && kernel_ != gemm::Kernel::ggml && gemm::can_attend_all(heads.q) &&
        matmul_.rounds(for_matmul.tensor))
        return gemm::attend_all(c_.ctx, heads.q, heads.k, heads.v);
    return pydiffusion::attend(c_.ctx, heads.q, tokens_of_heads(heads.k), tokens_of_heads(heads.v), nullptr,
                               kernel_);
}

ggml_tensor* CpuOps::limit(ggml_tensor* x, float low, float high) {
    return pydiffusion::limit(c_.ctx, x, low, high);
}

ggml_tensor* CpuOps::add_changes(const std::vector<LowRank>& changes, ggml_tensor* x, ggml_tensor* result) {
    for (const LowRank& change : changes) {
        result = matmul_.rounds(change.a) && matmul_.rounds(change.b)
                     ? matmul_.add_low_rank(change, x, result)
                     : add_low_rank(c_.ctx, change, x, result);
    }
    return result;
}

ggml_tensor* CpuOps::add_expert_changes(const std::vector<LowRank>& changes, ggml_tensor* x,
                                        ggml_tensor* chosen, ggml_tensor* result) {
    if (matmul_.rounds(changes[0].a)) return Ops::add_expert_changes(changes, x, chosen, result);
    for (const LowRank& change : changes) result = add_low_rank(c_.ctx, change, x, result, chosen);
    return result;
}

Mixture CpuOps::moe(ggml_tensor* x, const RouterChoice& choice, const ExpertWeights& w) {
    ggml_tensor* chosen = top_k(c_.ctx, choice.scores, w.n_used);
    return {nullptr, experts(x, chosen, w), choice.scores, chosen};
}

ggml_tensor* CpuOps::join(ggml_tensor* x, ggml_tensor* dense, const Mixture& mixture, const JoinWeights& w,
                          const NextInput&) {
    return join_in_one_node(x, dense, mixture, w).result;
}

}  // namespace pydiffusion
