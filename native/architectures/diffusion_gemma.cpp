#include "architectures/diffusion_gemma.h"

#include <cmath>

#include "backend/cpu/fused_rows.h"
#include "backend/cpu/top_k.h"
#include "backend/expert_nodes.h"
#include "backend/ggml/ggml_ops.h"

namespace pydiffusion {

namespace {

// x [head_dim * n_heads, n_tokens] -> [head_dim, n_heads, n_tokens]
ggml_tensor* split_heads(const GraphBuilder& g, ggml_tensor* x, int64_t head_dim) {
    return ggml_reshape_3d(g.ctx(), x, head_dim, x->ne[0] / head_dim, x->ne[1]);
}

// View of n tokens of x [a, b, n_tokens] from `first` on.
ggml_tensor* view_tokens(const GraphBuilder& g, ggml_tensor* x, int64_t first, int64_t n) {
    if (n == x->ne[2]) return x;
    return ggml_view_3d(g.ctx(), x, x->ne[0], x->ne[1], n, x->nb[1], x->nb[2], first * x->nb[2]);
}

// Q, K and V before their norms, [head_dim, n_heads, n_tokens]. Full layers derive V from K.
struct Heads {
    ggml_tensor *q, *k, *v;
};

// h [d, n_tokens] is the layer's input after its norm; without Q if it isn't needed.
Heads project(GraphBuilder& g, int32_t i_layer, ggml_tensor* h, bool with_q) {
    const LayerWeights& w = g.model.weights.layers[i_layer];
    const int64_t head_dim = g.model.hparams.layers[i_layer].head_dim;
    if (with_q && w.attn_qkv && g.fuses_rows()) {
        ggml_tensor* all = g.matmul->apply(w.attn_qkv, h);
        int64_t offset = 0;
        const auto next = [&](const ggml_tensor* weight) {
            const int64_t at = offset;
            offset += weight->ne[1] * all->nb[0];
            return ggml_view_3d(g.ctx(), all, head_dim, weight->ne[1] / head_dim, all->ne[1],
                                head_dim * all->nb[0], all->nb[1], at);
        };
        ggml_tensor *q = next(w.attn_q), *k = next(w.attn_k);
        return {q, k, w.attn_v ? next(w.attn_v) : k};
    }
    ggml_tensor* k = split_heads(g, g.matmul->apply(w.attn_k, h), head_dim);
    ggml_tensor* v = w.attn_v ? split_heads(g, g.matmul->apply(w.attn_v, h), head_dim) : k;
    return {with_q ? split_heads(g, g.matmul->apply(w.attn_q, h), head_dim) : nullptr, k, v};
}

// Writes K and V to the sequences' caches. V has no RoPE and a norm without weight.
void store(GraphBuilder& g, int32_t i_layer, const Heads& heads) {
    int64_t first = 0;
    for (const Sequence& sequence : g.sequences) {
        const int64_t n = sequence.n_tokens;
        const KvRange range = sequence.cache->range(i_layer);
        g.store_normed(view_tokens(g, heads.k, first, n), g.model.weights.layers[i_layer].attn_k_norm,
                       i_layer, first, range.k, range.write);
        g.store_normed(view_tokens(g, heads.v, first, n), nullptr, i_layer, first, range.v, range.write);
        first += n;
    }
}

// Norm before attention, of the type that the projections want.
ggml_tensor* attention_input(GraphBuilder& g, int32_t i_layer, ggml_tensor* x) {
    const LayerWeights& w = g.model.weights.layers[i_layer];
    return g.rms_norm(x, w.attn_norm, g.matmul->activation_type({w.attn_q, w.attn_k, w.attn_v}));
}

// View of a cache buffer from the first visible row on -> [head_dim, n_rows, n_head_kv]
ggml_tensor* visible_rows(const GraphBuilder& g, ggml_tensor* buffer, const KvRange& range, int64_t head_dim,
                          int64_t n_rows) {
    return ggml_view_3d(g.ctx(), buffer, head_dim, n_rows, buffer->ne[0] / head_dim, buffer->nb[1],
                        ggml_row_size(buffer->type, head_dim), range.first * buffer->nb[1]);
}

// Attention of one sequence over its cache: q [head_dim, n_head, n_tokens] -> [head_dim * n_head, n_tokens]
ggml_tensor* attend_sequence(GraphBuilder& g, size_t i_sequence, int32_t i_layer, ggml_tensor* q,
                             const Causal* causal) {
    const Sequence& sequence = g.sequences[i_sequence];
    const KvRange range = causal ? sequence.cache->causal_range(i_layer) : sequence.cache->range(i_layer);
    const int64_t n_visible = range.n_visible(sequence.n_tokens + sequence.n_frozen), head_dim = q->ne[0];
    if (!g.uses_ggml_ops()) {
        ggml_tensor* k = visible_rows(g, range.k, range, head_dim, n_visible);
        ggml_tensor* v = visible_rows(g, range.v, range, head_dim, n_visible);
        return attend(g.ctx(), q, k, v, causal, g.model.backend.kernel());
    }
    const ggml_ops::Mask mask = g.mask(i_sequence, i_layer, n_visible, causal);
    ggml_tensor* k = visible_rows(g, range.k, range, head_dim, mask.tensor->ne[0]);
    ggml_tensor* v = visible_rows(g, range.v, range, head_dim, mask.tensor->ne[0]);
    return ggml_ops::attend(g.ctx(), g.model.backend, q, k, v, mask);
}

ggml_tensor* attention(GraphBuilder& g, int32_t i_layer, ggml_tensor* x, const Causal* causal) {
    const LayerWeights& w = g.model.weights.layers[i_layer];
    ggml_tensor* h = attention_input(g, i_layer, x);
    // Else x is copied to another device both before and after the norm.
    if (!g.fuses_rows()) g.pin_to_device_of(w.attn_norm, h->src[0]);
    const Heads heads = project(g, i_layer, h, true);

    std::vector<ggml_tensor*> outputs;
    int64_t first = 0;
    for (size_t i = 0; i < g.sequences.size(); ++i) {
        const int64_t n = g.sequences[i].n_tokens;
        ggml_tensor* q = g.rotate_and_store(
            view_tokens(g, heads.q, first, n), view_tokens(g, heads.k, first, n),
            view_tokens(g, heads.v, first, n), i_layer, first, g.sequences[i].cache->range(i_layer));
        outputs.push_back(attend_sequence(g, i, i_layer, q, causal));
        first += n;
    }
    return g.matmul->apply(w.attn_output, g.concat_tokens(outputs));
}

// Router logits of r [d, n_tokens] -> [n_expert, n_tokens], still to be divided by sqrt(d): the reference
// divides the router's input instead, which is much longer.
ggml_tensor* router(GraphBuilder& g, const LayerWeights& w, ggml_tensor* r) {
    return g.matmul->apply(w.ffn_gate_inp, g.rms_norm(r, w.ffn_gate_inp_scale));
}

// Output of each selected expert: x [d, 1, n_tokens], selected [n_used, n_tokens] -> [d, n_used, n_tokens]
ggml_tensor* experts(GraphBuilder& g, const LayerWeights& w, ggml_tensor* x, ggml_tensor* selected) {
    const Hparams& hp = g.model.hparams;
    ggml_context* ctx = g.ctx();
    ggml_tensor *gate, *up;
    if (w.ffn_gate_up_exps) {
        ggml_tensor* both = g.multiply_experts(w.ffn_gate_up_exps, x, selected);
        const auto half = [&](int64_t i) {
            return ggml_view_3d(ctx, both, hp.n_ff_expert, both->ne[1], both->ne[2], both->nb[1], both->nb[2],
                                i * hp.n_ff_expert * sizeof(float));
        };
        gate = half(0);
        up = half(1);
    } else {
        gate = g.multiply_experts(w.ffn_gate_exps, x, selected);
        up = g.multiply_experts(w.ffn_up_exps, x, selected);
    }
    return g.multiply_experts(w.ffn_down_exps, g.gated_gelu(gate, up), selected);
}

// [d, n_tokens] -> [d, 1, n_tokens]
ggml_tensor* one_row_per_token(const GraphBuilder& g, ggml_tensor* x) {
    return ggml_reshape_3d(g.ctx(), x, x->ne[0], 1, x->ne[1]);
}

// feed_forward() without the scale, from ggml's ops; `dense` is the output of the dense MLP.
ggml_tensor* ggml_feed_forward(GraphBuilder& g, const LayerWeights& w, ggml_tensor* r, ggml_tensor* dense) {
    dense = g.rms_norm(dense, w.post_ffw_norm_1);
    g.begin_part("experts");
    const float scale = 1.0f / std::sqrt(static_cast<float>(g.model.hparams.n_embd));
    ggml_tensor* probabilities = ggml_soft_max(g.ctx(), ggml_scale(g.ctx(), router(g, w, r), scale));
    const ggml_ops::Routing routing = ggml_ops::route(g.ctx(), g.graph, probabilities, w.ffn_down_exps_scale,
                                                      g.model.hparams.n_expert_used);
    if (!g.model.device_plan.single_device()) ggml_build_forward_expand(g.graph, routing.scales);
    ggml_tensor* y = experts(g, w, one_row_per_token(g, g.rms_norm(r, w.pre_ffw_norm_2)), routing.experts);
    ggml_build_forward_expand(g.graph, y);
    // Sum the experts' outputs on the device that computes them, so that only the much smaller sum is copied.
    const int first = ggml_graph_n_nodes(g.graph);
    ggml_tensor* sum = ggml_ops::weighted_sum(g.ctx(), g.graph, y, routing);
    g.pin_to_device_of(w.ffn_down_exps, first);
    ggml_tensor* mixture = g.rms_norm(sum, w.post_ffw_norm_2);
    return g.add_normed(r, ggml_add(g.ctx(), dense, mixture), w.post_ffw_norm);
}

bool fits_devices(const Hparams& hp) {
    return hp.n_expert <= kMaxDeviceExperts && hp.n_expert_used <= kMaxDeviceExpertsUsed;
}

// (r + norm(dense MLP + mixture of experts)) * scale, r [d, n_tokens], scale [1].
ggml_tensor* feed_forward(GraphBuilder& g, int32_t i_layer, ggml_tensor* r, ggml_tensor* scale) {
    const LayerWeights& w = g.model.weights.layers[i_layer];
    const DevicePlan& plan = g.model.device_plan;
    // Of experts on the CPU beside a layer on a device, only the sum is to be copied.
    const bool can_join = g.fuses_rows() && (!g.uses_ggml_ops() || fits_devices(g.model.hparams));
    const bool joins = can_join && plan.experts_device(i_layer) == plan.layer_device(i_layer);
    // Beside the experts if all of them is in one graph of the device: weights whose type it can't compute
    // with stay on the CPU.
    const ggml_tensor* up = w.ffn_gate_up_exps ? w.ffn_gate_up_exps : w.ffn_up_exps;
    const bool beside = joins && plan.layer_device(i_layer) != kCpuDevice && g.is_on_device(up) &&
                        g.is_on_device(w.ffn_down_exps) &&
                        (!w.ffn_gate_exps || g.is_on_device(w.ffn_gate_exps));
    g.begin_part("dense");
    ggml_tensor* dense = g.mlp(r, w.ffn_norm, w.ffn_gate, w.ffn_up, w.ffn_gate_up, w.ffn_down, beside);
    if (!joins) return ggml_mul(g.ctx(), ggml_feed_forward(g, w, r, dense), scale);
    g.begin_part("experts");
    ggml_tensor* scores = router(g, w, r);
    ggml_tensor* selected = top_k(g.ctx(), scores, g.model.hparams.n_expert_used);
    ggml_tensor* y = experts(g, w, one_row_per_token(g, g.rms_norm(r, w.pre_ffw_norm_2)), selected);
    const Branches branches = {dense,
                               w.post_ffw_norm_1,
                               y,
                               scores,
                               selected,
                               w.ffn_down_exps_scale,
                               w.post_ffw_norm_2,
                               w.post_ffw_norm,
                               scale};
    return join_branches(g.ctx(), r, branches, &g.model.hparams.rms_eps);
}

}  // namespace

void store_keys_and_values(GraphBuilder& g, int32_t i_layer, ggml_tensor* x) {
    store(g, i_layer, project(g, i_layer, attention_input(g, i_layer, x), false));
}

ggml_tensor* apply_layer(GraphBuilder& g, int32_t i_layer, Mode mode, ggml_tensor* x, const Causal* causal) {
    const LayerWeights& w = g.model.weights.layers[i_layer];
    g.begin_part("attention");
    ggml_tensor* r = g.add_normed(x, attention(g, i_layer, x, causal), w.post_attention_norm);
    return feed_forward(g, i_layer, r, mode == Mode::encoder ? w.encoder_scale : w.decoder_scale);
}

}  // namespace pydiffusion
