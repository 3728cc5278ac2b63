#include "graph/graph_builder.h"

#include <limits>

#include "util/error.h"

namespace pydiffusion {

namespace {

constexpr size_t kNodesOfChange = 16;  // at most, with what joins the tokens' ranges

}  // namespace

GraphBuilder::GraphBuilder(const Model& m, Mode mode_of_tokens, std::vector<Sequence> s, GraphMemory* memory)
    : model(m), mode(mode_of_tokens), sequences(std::move(s)) {
    changes_ = collect_changes();
    size_t n_changes = 0;
    for (const auto& [weight, changes] : changes_) n_changes += changes.size();
    const size_t n_nodes =
        (128 + 2 * m.hparams.n_expert_used + 24 * sequences.size()) * m.hparams.layers.size() + 64 +
        16 * sequences.size() + 8 * n_images() + kNodesOfChange * n_changes;
    context = new_graph_context(n_nodes, memory);
    graph = ggml_new_graph_custom(ctx(), n_nodes, false);
    // On a device: tokens, features and positions; of both layer kinds masks and angles.
    inputs = std::make_unique<GraphInputs>(ctx(), m.backend, 5 + 2 * sequences.size());
    ops = make_ops({ctx(), graph, m.backend, *inputs, n_tokens(), &m.hparams.rms_eps,
                    m.device_plan.single_device(), changes_.empty() ? nullptr : &changes_});
}

namespace {

const AdapterList& adapters_of(const Sequence& sequence) {
    static const AdapterList none;
    return sequence.adapters ? *sequence.adapters : none;
}

}  // namespace

// Sequences beside each other with the same adapters are one range of tokens.
LowRankTable GraphBuilder::collect_changes() const {
    LowRankTable table;
    const Side side = mode == Mode::encoder ? Side::encoder : Side::decoder;
    int64_t first = 0;
    for (size_t i = 0; i < sequences.size();) {
        const AdapterList& adapters = adapters_of(sequences[i]);
        int64_t n = 0;
        for (; i < sequences.size() && adapters_of(sequences[i]) == adapters; ++i) n += sequences[i].n_tokens;
        for (const ActiveAdapter& active : adapters) {
            for (const auto& [weight, factors] : active.adapter->changes(side)) {
                for (const Adapter::Factors& f : factors)
                    table[weight].push_back({f.a, f.b, active.scale, first, n});
            }
        }
        first += n;
    }
    return table;
}

int64_t GraphBuilder::n_tokens() const {
    int64_t n = 0;
    for (const Sequence& sequence : sequences) n += sequence.n_tokens;
    return n;
}

size_t GraphBuilder::n_images() const {
    size_t n = 0;
    for (const Sequence& sequence : sequences) n += sequence.images.size();
    return n;
}

ggml_tensor* GraphBuilder::embed(ggml_tensor* tokens) const {
    ggml_tensor* rows = ggml_get_rows(ctx(), model.weights.token_embd.tensor, tokens);
    const float scale = model.embedding_scale();
    return scale == 1.0f ? rows : ggml_scale(ctx(), rows, scale);
}

ggml_tensor* GraphBuilder::logits(ggml_tensor* x, const ggml_tensor* target) const {
    const Weights& w = model.weights;
    ggml_tensor* head =
        ops->unscaled_matmul_node(w.output.tensor, ops->rms_norm(x, w.output_norm, {w.output}));
    if (target) ggml_backend_tensor_alloc(target->buffer, head, target->data);
    return w.output.scale == 1.0f ? head : ggml_scale_inplace(ctx(), head, w.output.scale);
}

Rope GraphBuilder::rope(int32_t i_layer) const {
    const Hparams& hp = model.hparams;
    const int32_t device = model.device_plan.layer_device(i_layer);
    if (hp.layers[i_layer].sliding) return {device, hp.rope_base_swa, hp.n_ctx_train, nullptr, nullptr};
    const std::vector<float>& factors = model.weights.rope_factors;
    return {device, hp.rope_base, hp.n_ctx_train, model.weights.rope_freqs[device - kCpuDevice],
            factors.empty() ? nullptr : &factors};
}

const Causal* GraphBuilder::causal(size_t i_sequence, int32_t i_layer) {
    if (mode == Mode::decoder) return nullptr;
    const bool sliding = model.hparams.layers[i_layer].sliding;
    for (const LayerMask& known : causal_) {
        if (known.i_sequence == i_sequence && known.sliding == sliding) return &known.causal;
    }
    const KvCache& cache = *sequences[i_sequence].cache;
    causal_.push_back({i_sequence,
                       sliding,
                       {cache.causal_range(i_layer).first_position, cache.n_past(),
                        sliding ? model.hparams.window : std::numeric_limits<int32_t>::max()}});
    if (model.hparams.bidirectional_images) causal_.back().causal.images = sequences[i_sequence].images;
    return &causal_.back().causal;
}

namespace {

// View of n tokens of x [a, b, n_tokens] from `first` on; null of null.
ggml_tensor* view_tokens(ggml_context* ctx, ggml_tensor* x, int64_t first, int64_t n) {
    if (!x || n == x->ne[2]) return x;
    return ggml_view_3d(ctx, x, x->ne[0], x->ne[1], n, x->nb[1], x->nb[2], first * x->nb[2]);
}

Heads view_tokens(ggml_context* ctx, const Heads& heads, int64_t first, int64_t n) {
    ggml_tensor* q = view_tokens(ctx, heads.q, first, n);
    ggml_tensor* k = view_tokens(ctx, heads.k, first, n);
    return {q, k, view_tokens(ctx, heads.v, first, n)};
}

CacheRows rows_to_write(const Sequence& sequence, int32_t i_layer) {
    const KvRange range = sequence.cache->range(i_layer);
    return {range.k, range.v, range.write, sequence.n_tokens};
}

}  // namespace

ggml_tensor* GraphBuilder::attention(int32_t i_layer, const Heads& heads, const HeadNorms& norms,
                                     const WeightMatrix& output, float scale) {
    // Results that are concatenated stay float32.
    const ForMatmuls one = {output}, none = {};
    std::vector<ggml_tensor*> outputs;
    int64_t first = 0;
    for (size_t i = 0; i < sequences.size(); ++i) {
        const Heads own = view_tokens(ctx(), heads, first, sequences[i].n_tokens);
        ggml_tensor* q =
            ops->rotate_and_store(own, norms, rope(i_layer), first, rows_to_write(sequences[i], i_layer));
        if (scale != 1.0f) {
            if (q->type != GGML_TYPE_F32) q = ggml_cast(ctx(), q, GGML_TYPE_F32);
            q = ggml_scale(ctx(), q, scale);
        }
        outputs.push_back(attend(i, i_layer, q, sequences.size() == 1 ? one : none));
        first += sequences[i].n_tokens;
    }
    return ops->concat_tokens(outputs);
}

ggml_tensor* GraphBuilder::attend(size_t i_sequence, int32_t i_layer, ggml_tensor* q,
                                  ForMatmuls for_matmuls) {
    const Sequence& sequence = sequences[i_sequence];
    const KvRange range =
        mode == Mode::encoder ? sequence.cache->causal_range(i_layer) : sequence.cache->range(i_layer);
    const int64_t n_visible = range.n_visible(sequence.n_tokens + sequence.n_frozen);
    return ops->attend(q, {range.k, range.v, range.first, n_visible}, causal(i_sequence, i_layer),
                       model.device_plan.layer_device(i_layer), for_matmuls);
}

void GraphBuilder::store(int32_t i_layer, const Heads& heads, const HeadNorms& norms) {
    int64_t first = 0;
    for (const Sequence& sequence : sequences) {
        const Heads own = view_tokens(ctx(), heads, first, sequence.n_tokens);
        ops->store(own, norms, rope(i_layer), first, rows_to_write(sequence, i_layer));
        first += sequence.n_tokens;
    }
}

void GraphBuilder::allocate(GraphExecutor& executor, const char* what) const {
    executor.allocate(graph, inputs->contexts(), ops->pinned(), what);
    ops->fill_masks();
}

void GraphBuilder::set_positions(const std::vector<int32_t>& positions) {
    if (positions == written_positions_) return;
    written_positions_ = positions;
    ops->set_positions(positions);
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

}  // namespace pydiffusion
