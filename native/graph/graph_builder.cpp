#include "graph/graph_builder.h"

#include <algorithm>
#include <cmath>

#include "backend/cpu/fused_rows.h"
#include "backend/cpu/top_k.h"
#include "util/error.h"

namespace pydiffusion {

GraphBuilder::GraphBuilder(const Model& m, std::vector<Sequence> s) : model(m), sequences(std::move(s)) {
    const size_t n_nodes =
        (128 + 2 * m.hparams.n_expert_used + 24 * sequences.size()) * m.hparams.layers.size() + 64 +
        16 * sequences.size();
    const ggml_init_params params = {
        n_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false), nullptr, true};
    require_memory((size_t{16} << 20) + 4 * params.mem_size);  // the allocator's tables come on top
    context.reset(ggml_init(params));
    if (!context) throw Error(ErrorKind::out_of_memory, "no memory for a graph's description");
    graph = ggml_new_graph_custom(ctx(), n_nodes, false);
    products.emplace(ctx(), model.engine.kernel(), portable());
    if (!portable()) return;
    const size_t n_inputs = 2 + 2 * sequences.size();  // tokens, positions; masks of both kinds of layers
    positions_.resize(model.engine.n_devices() + 1);
    for (int32_t place = kProcessor; place < model.engine.n_devices(); ++place) {
        input_contexts_.emplace_back(ggml_init({n_inputs * ggml_tensor_overhead(), nullptr, true}));
        if (!input_contexts_.back()) throw Error(ErrorKind::out_of_memory, "no memory for a graph's inputs");
    }
}

ggml_tensor* GraphBuilder::rms_norm(ggml_tensor* x, ggml_tensor* weight) const {
    if (!portable()) return pydiffusion::rms_norm(ctx(), x, weight, &model.hparams.rms_eps);
    ggml_tensor* n = ggml_rms_norm(ctx(), x, model.hparams.rms_eps);
    return weight ? ggml_mul(ctx(), n, weight) : n;
}

ggml_tensor* GraphBuilder::gelu_product(ggml_tensor* gate, ggml_tensor* up) const {
    return portable() ? portable::gated_gelu(ctx(), gate, up) : gated_gelu(ctx(), gate, up);
}

ggml_tensor* GraphBuilder::stack(const std::vector<ggml_tensor*>& parts) const {
    if (!portable()) return stack_tokens(ctx(), parts);
    ggml_tensor* all = parts[0];
    for (size_t i = 1; i < parts.size(); ++i) all = ggml_concat(ctx(), all, parts[i], 1);
    return all;
}

ggml_tensor* GraphBuilder::add_normed(ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight) const {
    if (portable()) return ggml_add(ctx(), x, rms_norm(branch, weight));
    return pydiffusion::add_normed(ctx(), x, branch, weight, &model.hparams.rms_eps);
}

ggml_tensor* GraphBuilder::rotate_normed(ggml_tensor* x, ggml_tensor* weight, int32_t i_layer,
                                         int64_t first) {
    const bool sliding = model.hparams.layers[i_layer].sliding;
    if (!portable()) {
        ggml_tensor* all = angles(x->ne[0], sliding);
        ggml_tensor* own = ggml_view_2d(ctx(), all, all->ne[0], x->ne[2], all->nb[1], first * all->nb[1]);
        return pydiffusion::rotate_normed(ctx(), x, weight, own, &model.hparams.rms_eps);
    }
    // A device takes no operation with inputs in another's memory.
    const int32_t place = model.placement.layer(i_layer);
    ggml_tensor*& positions = positions_[place - kProcessor];
    if (!positions) positions = new_input_on(place, GGML_TYPE_I32, n_tokens(), 1);
    ggml_tensor* own = ggml_view_1d(ctx(), positions, x->ne[2], first * positions->nb[0]);
    const Hyperparameters& hp = model.hparams;
    ggml_tensor* factors = sliding ? nullptr : model.weights.rope_freqs[place - kProcessor];
    return ggml_rope_ext(ctx(), rms_norm(x, weight), own, factors, static_cast<int>(x->ne[0]),
                         GGML_ROPE_TYPE_NEOX, hp.n_ctx_train, sliding ? hp.rope_base_swa : hp.rope_base, 1.0f,
                         0.0f, 1.0f, 0.0f, 0.0f);
}

ggml_tensor* GraphBuilder::angles(int64_t head_dim, bool sliding) {
    for (const Angles& a : angles_) {
        if (a.sliding == sliding && a.tensor->ne[0] == head_dim) return a.tensor;
    }
    angles_.push_back({sliding, new_input(GGML_TYPE_F32, head_dim, n_tokens())});
    return angles_.back().tensor;
}

int64_t GraphBuilder::n_tokens() const {
    int64_t n = 0;
    for (const Sequence& sequence : sequences) n += sequence.n_tokens;
    return n;
}

namespace {

// Angle i of a token is position / (base^(2 i / head_dim) * factor[i]), rounded where the reference rounds.
void write_angles(ggml_tensor* tensor, const std::vector<int32_t>& positions, float base,
                  const float* factors) {
    const int64_t head_dim = tensor->ne[0], half = head_dim / 2;
    auto* row = static_cast<float*>(tensor->data);
    for (const int32_t position : positions) {
        for (int64_t i = 0; i < half; ++i) {
            const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
            const float frequency = 1.0f / (std::pow(base, exponent) * (factors ? factors[i] : 1.0f));
            const float angle = static_cast<float>(position) * frequency;
            row[i] = std::cos(angle);
            row[half + i] = std::sin(angle);
        }
        row += head_dim;
    }
}

}  // namespace

void GraphBuilder::set_positions(const std::vector<int32_t>& positions) {
    if (positions == written_) return;
    written_ = positions;
    for (ggml_tensor* of_place : positions_) {
        if (of_place)
            ggml_backend_tensor_set(of_place, positions.data(), 0, positions.size() * sizeof(int32_t));
    }
    const Hyperparameters& hp = model.hparams;
    for (const Angles& a : angles_) {
        const ggml_tensor* factors = a.sliding ? nullptr : model.weights.rope_freqs[0];  // the processor's
        write_angles(a.tensor, positions, a.sliding ? hp.rope_base_swa : hp.rope_base,
                     factors ? static_cast<const float*>(factors->data) : nullptr);
    }
}

ggml_tensor* GraphBuilder::new_input(ggml_type type, int64_t n0, int64_t n1) {
    if (portable()) return new_input_on(model.engine.n_devices() - 1, type, n0, n1);
    ggml_tensor* input = ggml_new_tensor_2d(ctx(), type, n0, n1);
    ggml_set_input(input);
    ggml_set_output(input);  // else its memory is used again once it has been read
    return input;
}

ggml_tensor* GraphBuilder::new_input_on(int32_t place, ggml_type type, int64_t n0, int64_t n1) {
    return ggml_new_tensor_2d(input_contexts_[place - kProcessor].get(), type, n0, n1);
}

void GraphBuilder::keep_with(const ggml_tensor* weight, ggml_tensor* tensor) {
    if (!model.placement.one_place()) kept_.emplace_back(tensor, weight);
}

void GraphBuilder::keep_with(const ggml_tensor* weight, int first_node) {
    for (int i = first_node; i < ggml_graph_n_nodes(graph); ++i) keep_with(weight, ggml_graph_node(graph, i));
}

void GraphBuilder::allocate(Workspace& workspace, const char* what) const {
    workspace.allocate(graph, input_contexts_, kept_, what);
    for (const MaskKey& key : masks_) portable::fill(key.mask);
}

portable::Mask GraphBuilder::mask(size_t i_sequence, int32_t i_layer, int64_t n_visible,
                                  const Causal* causal) {
    const bool sliding = model.hparams.layers[i_layer].sliding;
    const int32_t place = model.placement.layer(i_layer);
    for (const MaskKey& key : masks_) {
        if (key.i_sequence == i_sequence && key.place == place && key.sliding == sliding) return key.mask;
    }
    ggml_tensor* tensor =
        new_input_on(place, GGML_TYPE_F16, portable::filled_up(n_visible), sequences[i_sequence].n_tokens);
    masks_.push_back({i_sequence, place, sliding, {tensor, n_visible, causal}});
    return masks_.back().mask;
}

ggml_tensor* GraphBuilder::mlp(ggml_tensor* x, ggml_tensor* gate, ggml_tensor* up, ggml_tensor* down) {
    ggml_tensor* h = gelu_product(products->multiply(gate, x), products->multiply(up, x));
    return products->multiply(down, h);
}

ggml_tensor* GraphBuilder::embed(ggml_tensor* ids) const {
    ggml_tensor* rows = ggml_get_rows(ctx(), model.weights.token_embd, ids);
    return ggml_scale(ctx(), rows, std::sqrt(static_cast<float>(model.hparams.n_embd)));
}

const char* GraphBuilder::part_of(const ggml_tensor* tensor) const {
    const size_t offset =
        reinterpret_cast<const char*>(tensor) - static_cast<const char*>(ggml_get_mem_buffer(ctx()));
    const char* name = "other";
    for (const Part& part : parts) {
        if (part.begin <= offset) name = part.name;
    }
    return name;
}

namespace {

// x [head_dim * n_heads, n_tokens] -> [head_dim, n_heads, n_tokens]
ggml_tensor* split_heads(const GraphBuilder& g, ggml_tensor* x, int64_t head_dim) {
    return ggml_reshape_3d(g.ctx(), x, head_dim, x->ne[0] / head_dim, x->ne[1]);
}

void write_rows(GraphBuilder& g, ggml_tensor* rows, ggml_tensor* cache, int64_t first) {
    ggml_tensor* target =
        ggml_view_2d(g.ctx(), cache, cache->ne[0], rows->ne[2], cache->nb[1], first * cache->nb[1]);
    ggml_tensor* source = ggml_reshape_2d(g.ctx(), rows, cache->ne[0], rows->ne[2]);
    ggml_build_forward_expand(g.graph, ggml_cpy(g.ctx(), source, target));
}

// Some of the tokens of x [a, b, n_tokens], from `first` on.
ggml_tensor* tokens_of(const GraphBuilder& g, ggml_tensor* x, int64_t first, int64_t n) {
    if (n == x->ne[2]) return x;
    return ggml_view_3d(g.ctx(), x, x->ne[0], x->ne[1], n, x->nb[1], x->nb[2], first * x->nb[2]);
}

// h [d, n_tokens], already normed. Values go without rope and without a weight; full layers take them from
// the keys before their norm.
void store_normed(GraphBuilder& g, int32_t i_layer, ggml_tensor* h) {
    const LayerWeights& w = g.model.weights.layers[i_layer];
    const LayerShape& shape = g.model.hparams.layers[i_layer];
    ggml_tensor* k = split_heads(g, g.products->multiply(w.attn_k, h), shape.head_dim);
    ggml_tensor* v = w.attn_v ? split_heads(g, g.products->multiply(w.attn_v, h), shape.head_dim) : k;
    v = g.rms_norm(v);
    k = g.rotate_normed(k, w.attn_k_norm, i_layer);
    int64_t first = 0;
    for (const Sequence& sequence : g.sequences) {
        const KvRange range = sequence.cache->range(i_layer);
        write_rows(g, tokens_of(g, k, first, sequence.n_tokens), range.k, range.write);
        write_rows(g, tokens_of(g, v, first, sequence.n_tokens), range.v, range.write);
        first += sequence.n_tokens;
    }
}

// Rows of a cache buffer from the first visible one on -> [head_dim, n_rows, n_head_kv]
ggml_tensor* visible_rows(const GraphBuilder& g, ggml_tensor* buffer, const KvRange& range, int64_t head_dim,
                          int64_t n_rows) {
    return ggml_view_3d(g.ctx(), buffer, head_dim, n_rows, buffer->ne[0] / head_dim, buffer->nb[1],
                        ggml_row_size(buffer->type, head_dim), range.first * buffer->nb[1]);
}

// q [head_dim, n_head, n_tokens] of one sequence over its cache -> [head_dim * n_head, n_tokens]
ggml_tensor* attend_sequence(GraphBuilder& g, size_t i_sequence, int32_t i_layer, ggml_tensor* q,
                             const Causal* causal) {
    const Sequence& sequence = g.sequences[i_sequence];
    const KvRange range = causal ? sequence.cache->causal_range(i_layer) : sequence.cache->range(i_layer);
    const int64_t n_visible = range.n_visible(sequence.n_tokens + sequence.n_frozen), head_dim = q->ne[0];
    if (!g.portable()) {
        ggml_tensor* k = visible_rows(g, range.k, range, head_dim, n_visible);
        ggml_tensor* v = visible_rows(g, range.v, range, head_dim, n_visible);
        return attend(g.ctx(), q, k, v, causal, g.model.engine.kernel());
    }
    const portable::Mask mask = g.mask(i_sequence, i_layer, n_visible, causal);
    ggml_tensor* k = visible_rows(g, range.k, range, head_dim, mask.tensor->ne[0]);
    ggml_tensor* v = visible_rows(g, range.v, range, head_dim, mask.tensor->ne[0]);
    return portable::attend(g.ctx(), g.model.engine, q, k, v, mask);
}

ggml_tensor* attention(GraphBuilder& g, int32_t i_layer, ggml_tensor* x, const Causal* causal) {
    const LayerWeights& w = g.model.weights.layers[i_layer];
    const LayerShape& shape = g.model.hparams.layers[i_layer];
    ggml_tensor* h = g.rms_norm(x, w.attn_norm);
    g.keep_with(w.attn_norm, h->src[0]);  // else x is moved to another device in both forms
    store_normed(g, i_layer, h);

    ggml_tensor* q = split_heads(g, g.products->multiply(w.attn_q, h), shape.head_dim);

    std::vector<ggml_tensor*> outputs;
    int64_t first = 0;
    for (size_t i = 0; i < g.sequences.size(); ++i) {
        const int64_t n_tokens = g.sequences[i].n_tokens;
        ggml_tensor* own = g.rotate_normed(tokens_of(g, q, first, n_tokens), w.attn_q_norm, i_layer, first);
        outputs.push_back(attend_sequence(g, i, i_layer, own, causal));
        first += n_tokens;
    }
    return g.products->multiply(w.attn_output, g.stack(outputs));
}

// r [d, n_tokens] -> the router's scores [n_expert, n_tokens], still to be divided by sqrt(d): the reference
// divides the far longer vectors that they are products of.
ggml_tensor* router(GraphBuilder& g, const LayerWeights& w, ggml_tensor* r) {
    return g.products->multiply(w.ffn_gate_inp, g.rms_norm(r, w.ffn_gate_inp_scale));
}

// x [d, 1, n_tokens] through the experts chosen [n_used, n_tokens] -> [d, n_used, n_tokens]
ggml_tensor* experts(GraphBuilder& g, const LayerWeights& w, ggml_tensor* x, ggml_tensor* chosen) {
    const Hyperparameters& hp = g.model.hparams;
    ggml_context* ctx = g.ctx();
    ggml_tensor *gate, *up;
    if (w.ffn_gate_up_exps) {
        ggml_tensor* both = g.products->multiply(w.ffn_gate_up_exps, x, chosen);
        const auto half = [&](int64_t i) {
            return ggml_view_3d(ctx, both, hp.n_ff_expert, both->ne[1], both->ne[2], both->nb[1], both->nb[2],
                                i * hp.n_ff_expert * sizeof(float));
        };
        gate = half(0);
        up = half(1);
    } else {
        gate = g.products->multiply(w.ffn_gate_exps, x, chosen);
        up = g.products->multiply(w.ffn_up_exps, x, chosen);
    }
    return g.products->multiply(w.ffn_down_exps, g.gelu_product(gate, up), chosen);
}

// [d, n_tokens] -> [d, 1, n_tokens]
ggml_tensor* each_token_alone(const GraphBuilder& g, ggml_tensor* x) {
    return ggml_reshape_3d(g.ctx(), x, x->ne[0], 1, x->ne[1]);
}

// What the two halves of a feed-forward part make of r [d, n_tokens], added to it.
ggml_tensor* portable_feed_forward(GraphBuilder& g, const LayerWeights& w, ggml_tensor* r,
                                   ggml_tensor* dense) {
    dense = g.rms_norm(dense, w.post_ffw_norm_1);
    g.begin_part("experts");
    const float scale = 1.0f / std::sqrt(static_cast<float>(g.model.hparams.n_embd));
    ggml_tensor* probabilities = ggml_soft_max(g.ctx(), ggml_scale(g.ctx(), router(g, w, r), scale));
    const portable::Routing routing = portable::route(g.ctx(), g.graph, probabilities, w.ffn_down_exps_scale,
                                                      g.model.hparams.n_expert_used);
    if (!g.model.placement.one_place()) ggml_build_forward_expand(g.graph, routing.scales);
    ggml_tensor* y = experts(g, w, each_token_alone(g, g.rms_norm(r, w.pre_ffw_norm_2)), routing.experts);
    ggml_build_forward_expand(g.graph, y);
    // They are many times what they are added up to: wherever they are computed, only the sum leaves.
    const int first = ggml_graph_n_nodes(g.graph);
    ggml_tensor* sum = portable::weighted_sum(g.ctx(), g.graph, y, routing);
    g.keep_with(w.ffn_down_exps, first);
    ggml_tensor* mixture = g.rms_norm(sum, w.post_ffw_norm_2);
    return g.add_normed(r, ggml_add(g.ctx(), dense, mixture), w.post_ffw_norm);
}

// r [d, n_tokens] plus what its dense and its experts' half make of it, times `scale` [1].
ggml_tensor* feed_forward(GraphBuilder& g, const LayerWeights& w, ggml_tensor* r, ggml_tensor* scale) {
    g.begin_part("dense");
    ggml_tensor* dense = g.mlp(g.rms_norm(r, w.ffn_norm), w.ffn_gate, w.ffn_up, w.ffn_down);
    if (g.portable()) return ggml_mul(g.ctx(), portable_feed_forward(g, w, r, dense), scale);
    g.begin_part("experts");
    ggml_tensor* scores = router(g, w, r);
    ggml_tensor* chosen = best_rows(g.ctx(), scores, g.model.hparams.n_expert_used);
    ggml_tensor* y = experts(g, w, each_token_alone(g, g.rms_norm(r, w.pre_ffw_norm_2)), chosen);
    const Branches branches = {dense,
                               w.post_ffw_norm_1,
                               y,
                               scores,
                               chosen,
                               w.ffn_down_exps_scale,
                               w.post_ffw_norm_2,
                               w.post_ffw_norm,
                               scale};
    return join_branches(g.ctx(), r, branches, &g.model.hparams.rms_eps);
}

}  // namespace

void store_keys_and_values(GraphBuilder& g, int32_t i_layer, ggml_tensor* x) {
    store_normed(g, i_layer, g.rms_norm(x, g.model.weights.layers[i_layer].attn_norm));
}

ggml_tensor* apply_layer(GraphBuilder& g, int32_t i_layer, Mode mode, ggml_tensor* x, const Causal* causal) {
    const LayerWeights& w = g.model.weights.layers[i_layer];
    g.begin_part("attention");
    ggml_tensor* r = g.add_normed(x, attention(g, i_layer, x, causal), w.post_attention_norm);
    return feed_forward(g, w, r, mode == Mode::encoder ? w.encoder_scale : w.decoder_scale);
}

}  // namespace pydiffusion
