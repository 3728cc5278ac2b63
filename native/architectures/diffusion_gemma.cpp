#include "architectures/diffusion_gemma.h"

#include "graph/graph_builder.h"

namespace pydiffusion {

namespace {

HeadWeights head_weights(const LayerWeights& w) { return {w.attn_q, w.attn_k, w.attn_v, w.attn_qkv}; }

HeadNorms head_norms(const LayerWeights& w) { return {w.attn_q_norm, w.attn_k_norm, true}; }

ExpertWeights expert_weights(const GraphBuilder& g, int32_t i_layer) {
    const LayerWeights& w = g.model.weights.layers[i_layer];
    return {w.ffn_gate_up_exps,
            w.ffn_gate_exps,
            w.ffn_up_exps,
            w.ffn_down_exps,
            w.ffn_gate_up_exps_scale,
            w.ffn_gate_exps_scale,
            w.ffn_up_exps_scale,
            w.ffn_down_exps_scale,
            g.model.hparams.n_expert_used,
            g.has_experts_with_layer(i_layer)};
}

// Of the layer after this one, if it is on the same device.
NextInput next_input(const GraphBuilder& g, int32_t i_layer) {
    const int32_t next = i_layer + 1;
    const DevicePlan& plan = g.model.device_plan;
    if (next == g.model.hparams.n_layer || plan.layer_device(next) != plan.layer_device(i_layer)) return {};
    const LayerWeights& w = g.model.weights.layers[next];
    return {w.attn_norm, head_weights(w)};
}

}  // namespace

ggml_tensor* DiffusionGemma::embed_prompt(GraphBuilder& g, ggml_tensor* tokens) const {
    return g.embed(tokens);
}

ggml_tensor* DiffusionGemma::embed_canvas(GraphBuilder& g, ggml_tensor* tokens, ggml_tensor* soft) const {
    const Weights& w = g.model.weights;
    g.begin_part("self-conditioning");
    ggml_tensor* s = g.ops->mlp(soft, w.self_cond_pre_norm,
                                {w.self_cond_gate, w.self_cond_up, w.self_cond_gate_up, w.self_cond_down});
    g.begin_part("embedding");
    return g.ops->rms_norm(ggml_add(g.ctx(), g.embed(tokens), s));
}

ggml_tensor* DiffusionGemma::layer(GraphBuilder& g, int32_t i_layer, ggml_tensor* x) const {
    const LayerWeights& w = g.model.weights.layers[i_layer];
    const ExpertWeights experts = expert_weights(g, i_layer);
    Ops& ops = *g.ops;

    g.begin_part("attention");
    ggml_tensor* h = ops.rms_norm(x, w.attn_norm, {w.attn_q, w.attn_k, w.attn_v});
    const Heads heads = ops.project(h, head_weights(w), g.head_dim(i_layer));
    ggml_tensor* a = g.attention(i_layer, heads, head_norms(w), w.attn_output);
    const MlpWeights mlp = {w.ffn_gate, w.ffn_up, w.ffn_gate_up, w.ffn_down};
    ggml_tensor* r = ops.end_attention(x, ops.matmul(w.attn_output, a), w.post_attention_norm,
                                       {w.ffn_norm, mlp, w.ffn_gate_inp_scale, w.pre_ffw_norm_2, experts});
    g.keep("attention", i_layer, r);

    g.begin_part("dense");
    ggml_tensor* dense = ops.mlp(r, w.ffn_norm, mlp, &experts);
    g.keep("dense", i_layer, dense);

    g.begin_part("experts");
    // Still to be divided by sqrt(d): the reference divides the router's input instead, which is much longer.
    const RouterChoice choice = ops.route(r, w.ffn_gate_inp_scale, w.ffn_gate_inp, experts);
    g.keep("router", i_layer, choice.scores);
    const Mixture mixture = ops.moe(ops.rms_norm(r, w.pre_ffw_norm_2), choice, experts);
    ggml_tensor* scale = g.mode == Mode::encoder ? w.encoder_scale : w.decoder_scale;
    ggml_tensor* joined =
        ops.join(r, dense, mixture,
                 {w.post_ffw_norm_1, w.post_ffw_norm_2, w.post_ffw_norm, scale, w.ffn_down_exps_scale},
                 next_input(g, i_layer));
    g.keep("output", i_layer, joined);
    return joined;
}

void DiffusionGemma::store_keys_and_values(GraphBuilder& g, int32_t i_layer, ggml_tensor* x) const {
    const LayerWeights& w = g.model.weights.layers[i_layer];
    ggml_tensor* h = g.ops->rms_norm(x, w.attn_norm, {w.attn_q, w.attn_k, w.attn_v});
    const HeadWeights without_q = {{}, w.attn_k, w.attn_v, nullptr};
    g.store(i_layer, g.ops->project(h, without_q, g.head_dim(i_layer)), head_norms(w));
}

}  // namespace pydiffusion
