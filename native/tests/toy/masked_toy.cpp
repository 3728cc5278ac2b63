#include "toy/masked_toy.h"

#include <cmath>

#include "graph/graph_builder.h"
#include "model/key_reader.h"
#include "model/weights_loader.h"
#include "util/error.h"

namespace pydiffusion {
namespace testing {

void MaskedToy::read_hparams(const KeyReader& keys, Hparams& hp) const {
    hp.n_layer = keys.integer(keys.own("block_count"), 1, 1024);
    hp.n_ctx_train = keys.integer(keys.own("context_length"), 1, INT32_MAX / 2);
    hp.n_embd = keys.integer(keys.own("embedding_length"), 1, 1 << 17);
    hp.n_ff = keys.integer(keys.own("feed_forward_length"), 1, 1 << 20);
    hp.n_head = keys.integer(keys.own("attention.head_count"), 1, 1024);
    hp.window = hp.n_ctx_train;  // no layer slides
    hp.rms_eps = keys.number(keys.own("attention.layer_norm_rms_epsilon"), 1e-12, 0.1);
    hp.soft_cap = keys.number(keys.own("final_logit_softcapping"), 1e-3, 1e6);
    hp.rope_base = keys.number(keys.own("rope.freq_base"), 1.0, 1e12);
    hp.mask_token = keys.integer(kMaskTokenKey, 0, INT32_MAX);
    const int32_t head_dim = keys.integer(keys.own("attention.key_length"), 2, 1024);
    if (head_dim % 2 != 0)
        keys.refuse(keys.own("attention.key_length"), format("is %d; it must be even", head_dim));
    const int32_t n_head_kv = keys.integer(keys.own("attention.head_count_kv"), 1, hp.n_head);
    if (hp.n_head % n_head_kv != 0)
        keys.refuse(keys.own("attention.head_count_kv"),
                    format("is %d, which does not divide the number of heads %d", n_head_kv, hp.n_head));
    hp.layers.assign(hp.n_layer, {false, head_dim, n_head_kv});
}

void MaskedToy::load_weights(WeightsLoader& load, const Hparams& hp, Weights& w) const {
    const int64_t d = hp.n_embd, ff = hp.n_ff, head_dim = hp.layers[0].head_dim;
    const int64_t q = head_dim * hp.n_head, kv = head_dim * hp.layers[0].n_head_kv;
    w.self_cond_pre_norm = load.f32("self_cond_pre_norm.weight", {d});
    w.self_cond_down = load.matrix("self_cond_proj.weight", {d, d});
    for (int32_t i = 0; i < hp.n_layer; ++i) {
        const auto name = [i](const char* suffix) { return format("blk.%d.%s.weight", i, suffix); };
        LayerWeights layer;
        layer.attn_norm = load.f32(name("attn_norm"), {d});
        layer.attn_q = load.matrix(name("attn_q"), {d, q});
        layer.attn_k = load.matrix(name("attn_k"), {d, kv});
        layer.attn_v = load.matrix(name("attn_v"), {d, kv});
        layer.attn_output = load.matrix(name("attn_output"), {q, d});
        layer.attn_q_norm = load.f32(name("attn_q_norm"), {head_dim});
        layer.attn_k_norm = load.f32(name("attn_k_norm"), {head_dim});
        layer.post_attention_norm = load.f32(name("post_attention_norm"), {d});
        layer.ffn_norm = load.f32(name("ffn_norm"), {d});
        layer.ffn_gate = load.matrix(name("ffn_gate"), {d, ff});
        layer.ffn_up = load.matrix(name("ffn_up"), {d, ff});
        layer.ffn_down = load.matrix(name("ffn_down"), {ff, d});
        layer.post_ffw_norm = load.f32(name("post_ffw_norm"), {d});
        w.layers.push_back(layer);
    }
}

ggml_tensor* MaskedToy::embed_prompt(GraphBuilder& g, ggml_tensor* tokens) const { return g.embed(tokens); }

ggml_tensor* MaskedToy::embed_canvas(GraphBuilder& g, ggml_tensor* tokens, ggml_tensor* soft) const {
    const Weights& w = g.model.weights;
    ggml_tensor* s = g.ops->matmul(w.self_cond_down, g.ops->rms_norm(soft, w.self_cond_pre_norm));
    return ggml_add(g.ctx(), g.embed(tokens), s);
}

namespace {

// V has neither norm nor RoPE.
HeadNorms head_norms(const LayerWeights& w) { return {w.attn_q_norm, w.attn_k_norm, false}; }

}  // namespace

ggml_tensor* MaskedToy::layer(GraphBuilder& g, int32_t i_layer, ggml_tensor* x) const {
    const LayerWeights& w = g.model.weights.layers[i_layer];
    Ops& ops = *g.ops;

    g.begin_part("attention");
    ggml_tensor* h = ops.rms_norm(x, w.attn_norm, {w.attn_q, w.attn_k, w.attn_v});
    const Heads heads = ops.project(h, {w.attn_q, w.attn_k, w.attn_v, nullptr}, g.head_dim(i_layer));
    const float scale = 1.0f / std::sqrt(static_cast<float>(g.head_dim(i_layer)));
    ggml_tensor* a = g.attention(i_layer, heads, head_norms(w), w.attn_output, scale);
    ggml_tensor* r = ops.add_normed(x, ops.matmul(w.attn_output, a), w.post_attention_norm);

    g.begin_part("dense");
    ggml_tensor* normed = ops.rms_norm(r, w.ffn_norm, {w.ffn_gate, w.ffn_up});
    ggml_tensor* gated = ops.gated_silu(ops.matmul(w.ffn_gate, normed), ops.matmul(w.ffn_up, normed));
    return ops.add_normed(r, ops.matmul(w.ffn_down, gated), w.post_ffw_norm);
}

void MaskedToy::store_keys_and_values(GraphBuilder& g, int32_t i_layer, ggml_tensor* x) const {
    const LayerWeights& w = g.model.weights.layers[i_layer];
    ggml_tensor* h = g.ops->rms_norm(x, w.attn_norm, {w.attn_k, w.attn_v});
    g.store(i_layer, g.ops->project(h, {{}, w.attn_k, w.attn_v, nullptr}, g.head_dim(i_layer)),
            head_norms(w));
}

}  // namespace testing
}  // namespace pydiffusion
