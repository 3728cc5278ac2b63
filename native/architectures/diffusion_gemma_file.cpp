// DiffusionGemma's hyperparameters and weights.
#include <algorithm>
#include <cmath>

#include "architectures/diffusion_gemma.h"
#include "model/hparams.h"
#include "model/key_reader.h"
#include "model/weights_loader.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

// Features of related models that are not implemented: ignoring them would give wrong results.
void refuse_features(const KeyReader& keys) {
    for (const char* name : {"attention.shared_kv_layers", "embedding_length_per_layer_input"}) {
        const std::string key = keys.own(name);
        if (!keys.has(key)) continue;
        for (const int64_t value : keys.integers(key)) {
            if (value != 0) keys.unsupported(key, "is not 0: not supported");
        }
    }
    const std::string key = keys.own("rope.scaling.type");
    if (!keys.has(key)) return;
    const Value& scaling = keys.require(key);
    const auto* kind = scaling.is_array ? nullptr : std::get_if<std::string>(&scaling.scalar);
    if (!kind || *kind != "none") keys.unsupported(key, "is not 'none': not supported");
}

// One bool per layer, true = sliding; or a period n whose last layer is full.
std::vector<bool> read_pattern(const KeyReader& keys, int32_t n_layer) {
    const std::string key = keys.own("attention.sliding_window_pattern");
    std::vector<bool> sliding;
    if (keys.require(key).is_array) {
        for (const int32_t flag : keys.per_layer(key, n_layer, 0, 1)) sliding.push_back(flag == 1);
    } else {
        const int32_t period = keys.integer(key, 1, n_layer);
        for (int32_t i = 0; i < n_layer; ++i) sliding.push_back((i + 1) % period != 0);
    }
    return sliding;
}

int32_t read_head_dim(const KeyReader& keys, const std::string& suffix) {
    const std::string key = keys.own("attention.key_length" + suffix);
    const int32_t head_dim = keys.integer(key, 2, 1024);
    if (head_dim % 2) keys.refuse(key, format("is %d; it must be even", head_dim));
    const std::string value_key = keys.own("attention.value_length" + suffix);
    if (keys.integer_or(value_key, head_dim, 1, 1024) != head_dim) {
        keys.unsupported(value_key, "differs from the key length: not supported");
    }
    const std::string rope_key = keys.own("rope.dimension_count" + suffix);
    if (keys.integer_or(rope_key, head_dim, 1, 1024) != head_dim) {
        keys.unsupported(rope_key, "differs from the head dimension: not supported");
    }
    return head_dim;
}

std::vector<LayerShape> read_layers(const KeyReader& keys, const Hparams& hp) {
    const std::vector<bool> sliding = read_pattern(keys, hp.n_layer);
    const std::string key = keys.own("attention.head_count_kv");
    const std::vector<int32_t> n_head_kv = keys.per_layer(key, hp.n_layer, 1, hp.n_head);
    const bool any_sliding = std::find(sliding.begin(), sliding.end(), true) != sliding.end();
    const bool any_full = std::find(sliding.begin(), sliding.end(), false) != sliding.end();
    const int32_t head_dim = any_full ? read_head_dim(keys, "") : 0;
    const int32_t head_dim_swa = any_sliding ? read_head_dim(keys, "_swa") : 0;
    std::vector<LayerShape> layers;
    for (int32_t i = 0; i < hp.n_layer; ++i) {
        if (hp.n_head % n_head_kv[i] != 0) {
            keys.refuse(key, format("is %d in layer %d, which does not divide the number of heads %d",
                                    n_head_kv[i], i, hp.n_head));
        }
        layers.push_back({sliding[i], sliding[i] ? head_dim_swa : head_dim, n_head_kv[i]});
    }
    return layers;
}

LayerWeights load_layer(WeightsLoader& load, const Hparams& hp, int32_t i) {
    const LayerShape& shape = hp.layers[i];
    const int64_t d = hp.n_embd, q = int64_t{shape.head_dim} * hp.n_head,
                  kv = int64_t{shape.head_dim} * shape.n_head_kv;
    const int64_t ff = hp.n_ff, ffx = hp.n_ff_expert, nx = hp.n_expert;
    const auto name = [i](const char* suffix) { return format("blk.%d.%s", i, suffix); };

    LayerWeights w;
    w.attn_norm = load.f32(name("attn_norm.weight"), {d});
    std::vector<std::pair<std::string, int64_t>> qkv = {{name("attn_q.weight"), q},
                                                        {name("attn_k.weight"), kv}};
    if (shape.sliding) qkv.emplace_back(name("attn_v.weight"), kv);
    w.attn_qkv = load.concatenated(d, qkv);
    w.ffn_gate_up = load.concatenated(d, {{name("ffn_gate.weight"), ff}, {name("ffn_up.weight"), ff}});
    w.attn_q = load.matrix(name("attn_q.weight"), {d, q});
    w.attn_k = load.matrix(name("attn_k.weight"), {d, kv});
    if (shape.sliding) w.attn_v = load.matrix(name("attn_v.weight"), {d, kv});
    w.attn_output = load.matrix(name("attn_output.weight"), {q, d});
    w.attn_q_norm = load.f32(name("attn_q_norm.weight"), {shape.head_dim});
    w.attn_k_norm = load.f32(name("attn_k_norm.weight"), {shape.head_dim});
    w.post_attention_norm = load.f32(name("post_attention_norm.weight"), {d});
    w.ffn_norm = load.f32(name("ffn_norm.weight"), {d});
    w.ffn_gate = load.matrix(name("ffn_gate.weight"), {d, ff});
    w.ffn_up = load.matrix(name("ffn_up.weight"), {d, ff});
    w.ffn_down = load.matrix(name("ffn_down.weight"), {ff, d});
    w.post_ffw_norm_1 = load.f32(name("post_ffw_norm_1.weight"), {d});
    w.pre_ffw_norm_2 = load.f32(name("pre_ffw_norm_2.weight"), {d});
    w.ffn_gate_inp = load.f32(name("ffn_gate_inp.weight"), {d, nx});
    w.ffn_gate_inp_scale = load.f32(name("ffn_gate_inp.scale"), {d});
    if (load.has(name("ffn_gate_up_exps.weight"))) {
        w.ffn_gate_up_exps = load.tensor(name("ffn_gate_up_exps.weight"), {d, 2 * ffx, nx});
        w.ffn_gate_up_exps_scale = load.expert_scales(name("ffn_gate_up_exps.weight"), nx);
    } else {
        w.ffn_gate_exps = load.tensor(name("ffn_gate_exps.weight"), {d, ffx, nx});
        w.ffn_gate_exps_scale = load.expert_scales(name("ffn_gate_exps.weight"), nx);
        w.ffn_up_exps = load.tensor(name("ffn_up_exps.weight"), {d, ffx, nx});
        w.ffn_up_exps_scale = load.expert_scales(name("ffn_up_exps.weight"), nx);
    }
    w.ffn_down_exps = load.tensor(name("ffn_down_exps.weight"), {ffx, d, nx});
    w.ffn_down_exps_scale = load.f32(name("ffn_down_exps.scale"), {nx});
    w.post_ffw_norm_2 = load.f32(name("post_ffw_norm_2.weight"), {d});
    w.post_ffw_norm = load.f32(name("post_ffw_norm.weight"), {d});
    w.decoder_scale = load.f32(name("layer_output_scale.weight"), {1});
    w.encoder_scale = load.f32(name("enc_layer_output_scale.weight"), {1});
    return w;
}

}  // namespace

void DiffusionGemma::read_hparams(const KeyReader& keys, Hparams& hp) const {
    refuse_features(keys);
    hp.n_layer = keys.integer(keys.own("block_count"), 1, 1024);
    hp.n_ctx_train = keys.integer(keys.own("context_length"), 1, INT32_MAX / 2);
    hp.n_embd = keys.integer(keys.own("embedding_length"), 1, 1 << 17);
    hp.n_ff = keys.integer(keys.own("feed_forward_length"), 1, 1 << 20);
    hp.n_ff_expert = keys.integer(keys.own("expert_feed_forward_length"), 1, 1 << 20);
    hp.n_expert = keys.integer(keys.own("expert_count"), 1, 4096);
    hp.n_expert_used = keys.integer(keys.own("expert_used_count"), 1, hp.n_expert);
    hp.n_head = keys.integer(keys.own("attention.head_count"), 1, 1024);
    hp.window = keys.integer(keys.own("attention.sliding_window"), 1, 1 << 24);
    hp.rms_eps = keys.number(keys.own("attention.layer_norm_rms_epsilon"), 1e-12, 0.1);
    hp.soft_cap = keys.number(keys.own("final_logit_softcapping"), 1e-3, 1e6);
    hp.embedding_scale = std::sqrt(static_cast<float>(hp.n_embd));
    hp.rope_base = keys.number(keys.own("rope.freq_base"), 1.0, 1e12);
    hp.rope_base_swa = keys.number_or(keys.own("rope.freq_base_swa"), 10000.0f, 1.0, 1e12);
    hp.layers = read_layers(keys, hp);
}

void DiffusionGemma::load_weights(WeightsLoader& load, const Hparams& hp, Weights& w) const {
    const int64_t d = hp.n_embd, ff = hp.n_ff;
    w.self_cond_pre_norm = load.f32("self_cond_pre_norm.weight", {d});
    w.self_cond_gate_up = load.concatenated(d, {{"self_cond_gate.weight", ff}, {"self_cond_up.weight", ff}});
    w.self_cond_gate = load.matrix("self_cond_gate.weight", {d, ff});
    w.self_cond_up = load.matrix("self_cond_up.weight", {d, ff});
    w.self_cond_down = load.matrix("self_cond_down.weight", {ff, d});
    const DevicePlan& plan = load.device_plan();
    for (int32_t i = 0; i < hp.n_layer; ++i) {
        const LayerShape& shape = hp.layers[i];
        ggml_tensor*& factors = w.rope_freqs[plan.layer_device(i) - kCpuDevice];
        if (shape.sliding || factors) continue;
        factors = load.f32_on(plan.layer_device(i), "rope_freqs.weight", {shape.head_dim / 2});
        w.rope_factors = load.values("rope_freqs.weight");
    }
    for (int32_t i = 0; i < hp.n_layer; ++i) w.layers.push_back(load_layer(load, hp, i));
}

}  // namespace pydiffusion
