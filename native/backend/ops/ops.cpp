#include "backend/ops/ops.h"

#include <algorithm>

#include "backend/ops/cpu_ops.h"
#include "backend/ops/ggml_ops.h"
#include "backend/ops/own_kernel_ops.h"

namespace pydiffusion {

ggml_tensor* Ops::matmul(const WeightMatrix& weight, ggml_tensor* x) {
    ggml_tensor* result = unscaled_matmul(weight.tensor, x);
    if (weight.scale != 1.0f) result = ggml_scale(c_.ctx, result, weight.scale);
    return with_changes(weight.tensor, x, result);
}

bool Ops::is_changed(std::initializer_list<const ggml_tensor*> weights) const {
    return c_.changes && std::any_of(weights.begin(), weights.end(), [this](const ggml_tensor* weight) {
               return c_.changes->count(weight) > 0;
           });
}

ggml_tensor* Ops::with_changes(const ggml_tensor* weight, ggml_tensor* x, ggml_tensor* result) {
    return is_changed({weight}) ? add_changes(c_.changes->at(weight), x, result) : result;
}

namespace {

// View of n tokens of x [a, n_tokens] or [a, b, n_tokens] from `first` on.
ggml_tensor* view_tokens(ggml_context* ctx, ggml_tensor* x, int i_dim, int64_t first, int64_t n) {
    if (n == x->ne[i_dim]) return x;
    if (i_dim == 1) return ggml_view_2d(ctx, x, x->ne[0], n, x->nb[1], first * x->nb[1]);
    return ggml_view_3d(ctx, x, x->ne[0], x->ne[1], n, x->nb[1], x->nb[2], first * x->nb[2]);
}

// The result's tokens (of dimension i_dim) in ranges that have the same changes: change(range, first, n,
// the range's changes), and ranges without any as they are.
template <typename Change>
std::vector<ggml_tensor*> changed_ranges(ggml_context* ctx, const std::vector<LowRank>& changes,
                                         ggml_tensor* result, int i_dim, const Change& change) {
    std::vector<ggml_tensor*> parts;
    int64_t at = 0;
    const auto view = [&](int64_t n) { return view_tokens(ctx, result, i_dim, at, n); };
    for (size_t i = 0; i < changes.size();) {
        const int64_t first = changes[i].first, n = changes[i].n;
        if (first > at) parts.push_back(view(first - at));
        at = first;
        ggml_tensor* part = view(n);
        for (; i < changes.size() && changes[i].first == first; ++i) part = change(part, changes[i]);
        parts.push_back(part);
        at += n;
    }
    if (at < result->ne[i_dim]) parts.push_back(view(result->ne[i_dim] - at));
    return parts;
}

}  // namespace

ggml_tensor* Ops::add_changes(const std::vector<LowRank>& changes, ggml_tensor* x, ggml_tensor* result) {
    const auto change = [&](ggml_tensor* part, const LowRank& c) {
        ggml_tensor* inner = unscaled_matmul(c.a, view_tokens(c_.ctx, x, 1, c.first, c.n));
        if (c.scale != 1.0f) inner = ggml_scale(c_.ctx, inner, c.scale);
        return ggml_add(c_.ctx, part, unscaled_matmul(c.b, inner));
    };
    const std::vector<ggml_tensor*> parts = changed_ranges(c_.ctx, changes, result, 1, change);
    return parts.size() == 1 ? parts[0] : concat_tokens(parts);
}

ggml_tensor* Ops::with_expert_changes(const ggml_tensor* weights, ggml_tensor* x, ggml_tensor* chosen,
                                      ggml_tensor* result) {
    return is_changed({weights}) ? add_expert_changes(c_.changes->at(weights), x, chosen, result) : result;
}

ggml_tensor* Ops::add_expert_changes(const std::vector<LowRank>& changes, ggml_tensor* x, ggml_tensor* chosen,
                                     ggml_tensor* result) {
    const auto change = [&](ggml_tensor* part, const LowRank& c) {
        ggml_tensor* own = view_tokens(c_.ctx, chosen, 1, c.first, c.n);
        ggml_tensor* inner = expert_matmul(c.a, view_tokens(c_.ctx, x, 2, c.first, c.n), own);
        if (c.scale != 1.0f) inner = ggml_scale(c_.ctx, inner, c.scale);
        return ggml_add(c_.ctx, part, expert_matmul(c.b, inner, own));
    };
    const std::vector<ggml_tensor*> parts = changed_ranges(c_.ctx, changes, result, 2, change);
    ggml_tensor* all = parts[0];
    for (size_t i = 1; i < parts.size(); ++i) all = ggml_concat(c_.ctx, all, parts[i], 2);
    return all;
}

ggml_tensor* Ops::add_normed(ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight) {
    return ggml_add(c_.ctx, x, rms_norm(branch, weight));
}

Heads Ops::project(ggml_tensor* h, const HeadWeights& w, int64_t head_dim) {
    ggml_tensor* k = split_heads(matmul(w.k, h), head_dim);
    ggml_tensor* v = w.v ? split_heads(matmul(w.v, h), head_dim) : k;
    return {w.q ? split_heads(matmul(w.q, h), head_dim) : nullptr, k, v};
}

void Ops::store(const Heads& heads, const HeadNorms& norms, const Rope& rope, int64_t first_token,
                const CacheRows& rows) {
    const auto write = [&](ggml_tensor* x, ggml_tensor* cache) {
        ggml_tensor* target =
            ggml_view_2d(c_.ctx, cache, cache->ne[0], rows.n, cache->nb[1], rows.first * cache->nb[1]);
        if (!ggml_is_contiguous(x)) x = ggml_cont(c_.ctx, x);  // V as it is, of concatenated projections
        ggml_tensor* source = ggml_reshape_2d(c_.ctx, x, cache->ne[0], rows.n);
        ggml_build_forward_expand(c_.graph, ggml_cpy(c_.ctx, source, target));
    };
    write(rotate(heads.k, norms.k, rope, first_token), rows.k);
    write(norms.v ? rms_norm(heads.v) : heads.v, rows.v);
}

ggml_tensor* Ops::rotate_and_store(const Heads& heads, const HeadNorms& norms, const Rope& rope,
                                   int64_t first_token, const CacheRows& rows) {
    store(heads, norms, rope, first_token, rows);
    return rotate(heads.q, norms.q, rope, first_token);
}

ggml_tensor* Ops::mlp(ggml_tensor* x, ggml_tensor* norm, const MlpWeights& w, const ExpertWeights*) {
    ggml_tensor* h = rms_norm(x, norm, {w.gate, w.up});
    ggml_tensor* gate = matmul(w.gate, h);
    ggml_tensor* up = matmul(w.up, h);
    return matmul(w.down, gated_gelu(gate, up, {w.down}));
}

ggml_tensor* Ops::scales_of(ggml_tensor* scales, ggml_tensor* chosen) const {
    scales = ggml_reshape_3d(c_.ctx, scales, 1, scales->ne[0], 1);
    scales = ggml_repeat_4d(c_.ctx, scales, 1, scales->ne[1], chosen->ne[1], 1);
    return ggml_get_rows(c_.ctx, scales, chosen);
}

ggml_tensor* Ops::changed_expert_matmul(ggml_tensor* weights, ggml_tensor* scales, ggml_tensor* x,
                                        ggml_tensor* chosen) {
    ggml_tensor* result = expert_matmul(weights, x, chosen);
    if (scales) result = ggml_mul(c_.ctx, result, scales_of(scales, chosen));
    return with_expert_changes(weights, x, chosen, result);
}

ggml_tensor* Ops::experts(ggml_tensor* x, ggml_tensor* chosen, const ExpertWeights& w) {
    x = one_row_per_token(x);
    if (!w.gate_up) {
        ggml_tensor* gate = changed_expert_matmul(w.gate, w.gate_scales, x, chosen);
        ggml_tensor* up = changed_expert_matmul(w.up, w.up_scales, x, chosen);
        return changed_expert_matmul(w.down, nullptr, gated_gelu(gate, up), chosen);
    }
    ggml_tensor* both = changed_expert_matmul(w.gate_up, w.gate_up_scales, x, chosen);
    const int64_t n_ff = both->ne[0] / 2;
    const auto half = [&](int64_t i) {
        return ggml_view_3d(c_.ctx, both, n_ff, both->ne[1], both->ne[2], both->nb[1], both->nb[2],
                            i * n_ff * both->nb[0]);
    };
    ggml_tensor* gate = half(0);
    return changed_expert_matmul(w.down, nullptr, gated_gelu(gate, half(1)), chosen);
}

ggml_tensor* Ops::join(ggml_tensor* x, ggml_tensor* dense, const Mixture& mixture, const JoinWeights& w,
                       const NextInput&) {
    dense = rms_norm(dense, w.dense_norm);
    ggml_tensor* sum = ggml_add(c_.ctx, dense, rms_norm(mixture.sum, w.mixture_norm));
    return ggml_mul(c_.ctx, add_normed(x, sum, w.norm), w.scale);
}

Joined Ops::join_in_one_node(ggml_tensor* x, ggml_tensor* dense, const Mixture& mixture, const JoinWeights& w,
                             ggml_tensor* next_norm, ggml_type next_type) {
    const Branches branches = {dense,          w.dense_norm,    mixture.experts, mixture.scores,
                               mixture.chosen, w.expert_scales, w.mixture_norm,  w.norm,
                               w.scale,        next_norm,       next_type};
    return join_branches(c_.ctx, x, branches, c_.rms_eps);
}

std::unique_ptr<Ops> make_ops(const OpsContext& context) {
    if (!context.backend.on_device()) return std::make_unique<CpuOps>(context);
    if (context.backend.fuses_rows()) return std::make_unique<OwnKernelOps>(context);
    return std::make_unique<GgmlOps>(context);
}

}  // namespace pydiffusion
