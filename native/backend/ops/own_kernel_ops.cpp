#include "backend/ops/own_kernel_ops.h"

#include <algorithm>

#include "backend/attention_node.h"
#include "backend/cpu/fused_rows.h"
#include "backend/cpu/router_sizes.h"
#include "backend/cpu/top_k.h"
#include "backend/mlp_beside.h"
#include "backend/repacked_weights.h"

namespace pydiffusion {

namespace {

bool is_on_device(const ggml_tensor* weight) { return !ggml_backend_buffer_is_host(weight->buffer); }

ggml_type result_type(ForMatmuls matmuls) {
    const auto is_bf16 = [](const WeightMatrix& weight) {
        return !weight || weight.tensor->type == GGML_TYPE_BF16;
    };
    const bool all = matmuls.size() > 0 && std::all_of(matmuls.begin(), matmuls.end(), is_bf16);
    return all ? GGML_TYPE_BF16 : GGML_TYPE_F32;
}

// Whether one node may choose, sum and join the experts: of experts on the CPU beside a layer on a device,
// only the sum is to be copied.
bool joins(const ExpertWeights& w) {
    return w.with_layer && w.down->ne[2] <= kMaxDeviceExperts && w.n_used <= kMaxDeviceExpertsUsed;
}

// Weights whose type a device can't compute with stay on the CPU.
bool is_whole_on_device(const ExpertWeights& w) {
    return joins(w) && is_on_device(w.gate_up ? w.gate_up : w.up) && is_on_device(w.down) &&
           (!w.gate || is_on_device(w.gate));
}

}  // namespace

ggml_tensor* OwnKernelOps::rms_norm(ggml_tensor* x, ggml_tensor* weight, ForMatmuls for_matmuls) {
    const ggml_type type = result_type(for_matmuls);
    const auto known = normed_.find({x, weight});
    if (known != normed_.end() && known->second->type == type) return known->second;
    return pydiffusion::rms_norm(c_.ctx, x, weight, c_.rms_eps, type);
}

ggml_tensor* OwnKernelOps::gated_gelu(ggml_tensor* gate, ggml_tensor* up, ForMatmuls for_matmuls) {
    return pydiffusion::gated_gelu(c_.ctx, gate, up, result_type(for_matmuls));
}

ggml_tensor* OwnKernelOps::add_normed(ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight) {
    return pydiffusion::add_normed(c_.ctx, x, branch, weight, c_.rms_eps);
}

bool OwnKernelOps::packs_input(const ExpertWeights& w, int64_t n_tokens) const {
    const auto packs = [&](const ggml_tensor* weights) {
        return expert_matmuls_.multiplies(weights, w.n_used, n_tokens);
    };
    if (!is_whole_on_device(w)) return false;
    if (w.gate_up) return packs(w.gate_up);
    return packs(w.gate) && packs(w.up) && is_repacked(w.gate) == is_repacked(w.up);
}

ggml_tensor* OwnKernelOps::end_attention(ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight,
                                         const BranchInputs& inputs) {
    const int64_t d = x->ne[0], n_tokens = x->ne[1];
    if (d % 4 != 0 || d > kMaxAttentionEnd || !ggml_is_contiguous(x) || !ggml_is_contiguous(branch))
        return add_normed(x, branch, weight);
    const bool packs = packs_input(inputs.experts, n_tokens);
    const ExpertWeights& experts = inputs.experts;
    const bool for_repacked = packs && is_repacked(experts.gate_up ? experts.gate_up : experts.up);
    const AttentionEnd end = pydiffusion::end_attention(
        c_.ctx, x, branch, weight,
        {inputs.dense_norm, result_type({inputs.dense.gate, inputs.dense.up}), inputs.router_norm,
         packs ? inputs.experts_norm : nullptr, packed_bytes(n_tokens, d), for_repacked},
        c_.rms_eps);
    normed_[{end.r, inputs.dense_norm}] = end.dense;
    normed_[{end.r, inputs.router_norm}] = end.router;
    if (packs) expert_matmuls_.add_packed(end.r, inputs.experts_norm, for_repacked, end.packed);
    return end.r;
}

Heads OwnKernelOps::project(ggml_tensor* h, const HeadWeights& w, int64_t head_dim) {
    if (!w.q || !w.qkv) return GgmlOps::project(h, w, head_dim);
    ggml_tensor* all = matmul({w.qkv}, h);
    int64_t offset = 0;
    const auto next = [&](const WeightMatrix& weight) {
        const int64_t at = offset, n_rows = weight.tensor->ne[1];
        offset += n_rows * all->nb[0];
        if (is_changed({weight.tensor})) {
            ggml_tensor* rows = ggml_view_2d(c_.ctx, all, n_rows, all->ne[1], all->nb[1], at);
            return split_heads(with_changes(weight.tensor, h, rows), head_dim);
        }
        return ggml_view_3d(c_.ctx, all, head_dim, n_rows / head_dim, all->ne[1], head_dim * all->nb[0],
                            all->nb[1], at);
    };
    ggml_tensor *q = next(w.q), *k = next(w.k);
    return {q, k, w.v ? next(w.v) : k};
}

ggml_tensor* OwnKernelOps::rotate(ggml_tensor* x, ggml_tensor* norm, const Rope& rope, int64_t first_token) {
    return rotate_normed(c_.ctx, x, norm, angles(rope, x, first_token), c_.rms_eps);
}

ggml_tensor* OwnKernelOps::target_heads(ggml_tensor* cache, int64_t head_dim, int64_t first,
                                        int64_t n) const {
    return ggml_view_3d(c_.ctx, cache, head_dim, cache->ne[0] / head_dim, n,
                        ggml_row_size(cache->type, head_dim), cache->nb[1], first * cache->nb[1]);
}

void OwnKernelOps::store(const Heads& heads, const HeadNorms& norms, const Rope& rope, int64_t first_token,
                         const CacheRows& rows) {
    if (ggml_is_quantized(rows.k->type) || !norms.v)
        return GgmlOps::store(heads, norms, rope, first_token, rows);
    const int64_t head_dim = heads.k->ne[0];
    const auto write = [&](ggml_tensor* x, ggml_tensor* weight, ggml_tensor* own, ggml_tensor* cache) {
        ggml_tensor* target = target_heads(cache, head_dim, rows.first, rows.n);
        ggml_build_forward_expand(c_.graph, store_normed(c_.ctx, x, weight, own, c_.rms_eps, target));
    };
    write(heads.k, norms.k, angles(rope, heads.k, first_token), rows.k);
    write(heads.v, nullptr, nullptr, rows.v);
}

ggml_tensor* OwnKernelOps::rotate_and_store(const Heads& heads, const HeadNorms& norms, const Rope& rope,
                                            int64_t first_token, const CacheRows& rows) {
    if (ggml_is_quantized(rows.k->type) || !norms.v)
        return GgmlOps::rotate_and_store(heads, norms, rope, first_token, rows);
    const int64_t head_dim = heads.q->ne[0];
    const StoredHeads stored = {heads.k, norms.k, heads.v, target_heads(rows.k, head_dim, rows.first, rows.n),
                                target_heads(rows.v, head_dim, rows.first, rows.n)};
    const bool for_kernel = c_.backend.attends(heads.q, rows_of_heads(rows.k, head_dim, rows.first, rows.n),
                                               rows_of_heads(rows.v, head_dim, rows.first, rows.n));
    ggml_tensor* q = pydiffusion::rotate_and_store(
        c_.ctx, heads.q, norms.q, angles(rope, heads.q, first_token), stored, c_.rms_eps,
        for_kernel ? GGML_TYPE_F16 : GGML_TYPE_F32);  // our attention would round it first
    ggml_build_forward_expand(c_.graph, q);           // before whatever reads the cache
    return q;
}

ggml_tensor* OwnKernelOps::attend(ggml_tensor* q, const CacheRows& visible, const Causal* causal,
                                  int32_t device, ForMatmuls for_matmuls) {
    ggml_tensor* k = rows_of_heads(visible.k, q->ne[0], visible.first, visible.n);
    ggml_tensor* v = rows_of_heads(visible.v, q->ne[0], visible.first, visible.n);
    if (causal && !causal->images.empty()) {  // the kernel has no place for them
        if (q->type != GGML_TYPE_F32) q = ggml_cast(c_.ctx, q, GGML_TYPE_F32);
        return GgmlOps::attend(q, visible, causal, device, for_matmuls);
    }
    if (!c_.backend.attends(q, k, v)) return GgmlOps::attend(q, visible, causal, device, for_matmuls);
    return attend_by_kernel(c_.ctx, q, k, v, causal, result_type(for_matmuls));
}

ggml_tensor* OwnKernelOps::mlp(ggml_tensor* x, ggml_tensor* norm, const MlpWeights& w,
                               const ExpertWeights* beside) {
    if (!w.gate_up) return GgmlOps::mlp(x, norm, w, beside);
    const bool bf16 = result_type({w.gate, w.up, w.down}) == GGML_TYPE_BF16;
    const bool changed = is_changed({w.gate.tensor, w.up.tensor, w.down.tensor});
    if (beside && is_whole_on_device(*beside) && bf16 && w.down.scale == 1.0f && !changed &&
        c_.backend.computes_mlp_beside()) {
        const auto known = normed_.find({x, norm});
        if (known != normed_.end()) {
            x = known->second;
            norm = nullptr;
        }
        return mlp_beside(c_.ctx, x, norm, w.gate_up, w.down.tensor, c_.rms_eps);
    }
    ggml_tensor* h = rms_norm(x, norm, {w.gate, w.up});
    ggml_tensor* both = matmul({w.gate_up}, h);
    const auto view = [&](const WeightMatrix& weight, size_t offset) {
        return with_changes(
            weight.tensor, h,
            ggml_view_2d(c_.ctx, both, weight.tensor->ne[1], both->ne[1], both->nb[1], offset));
    };
    ggml_tensor* gate = view(w.gate, 0);
    ggml_tensor* up = view(w.up, both->nb[0] * w.gate.tensor->ne[1]);
    return matmul(w.down, gated_gelu(gate, up, {w.down}));
}

RouterChoice OwnKernelOps::route(ggml_tensor* x, ggml_tensor* norm, ggml_tensor* weight,
                                 const ExpertWeights& w) {
    const bool fits = weight->type == GGML_TYPE_F32 && ggml_is_contiguous(weight) && weight->ne[0] % 4 == 0 &&
                      weight->ne[1] <= kMaxRouted && x->ne[1] <= kMaxRoutedTokens;
    if (!fits || !joins(w) || is_changed({weight})) return GgmlOps::route(x, norm, weight, w);
    const Routed routed = pydiffusion::route(c_.ctx, weight, rms_norm(x, norm, {}), w.n_used);
    return {routed.scores, routed.chosen};
}

Mixture OwnKernelOps::moe(ggml_tensor* x, const RouterChoice& choice, const ExpertWeights& w) {
    if (!joins(w)) return GgmlOps::moe(x, choice, w);
    ggml_tensor* chosen = choice.chosen ? choice.chosen : top_k(c_.ctx, choice.scores, w.n_used);
    ggml_tensor* result = nullptr;
    if (w.gate_up && !w.gate_up_scales && !is_changed({w.gate_up, w.down}))
        result = expert_matmuls_.apply_gated(w.gate_up, w.down, one_row_per_token(x), chosen);
    return {nullptr, result ? result : experts(x, chosen, w), choice.scores, chosen};
}

ggml_tensor* OwnKernelOps::join(ggml_tensor* x, ggml_tensor* dense, const Mixture& mixture,
                                const JoinWeights& w, const NextInput& next) {
    if (mixture.sum) return GgmlOps::join(x, dense, mixture, w, next);
    const Joined joined = join_in_one_node(x, dense, mixture, w, next.norm,
                                           result_type({next.heads.q, next.heads.k, next.heads.v}));
    if (joined.next) normed_[{joined.result, next.norm}] = joined.next;
    return joined.result;
}

ggml_tensor* OwnKernelOps::expert_matmul(ggml_tensor* weights, ggml_tensor* x, ggml_tensor* chosen) {
    ggml_tensor* result = expert_matmuls_.apply(weights, x, chosen);
    return result ? result : GgmlOps::expert_matmul(weights, x, chosen);
}

void OwnKernelOps::set_positions(const std::vector<int32_t>& positions) {
    GgmlOps::set_positions(positions);
    angles_.write(positions);
}

}  // namespace pydiffusion
