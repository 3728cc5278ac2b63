#include "graph/graph_builder.h"

#include <algorithm>
#include <cmath>

#include "backend/cpu/fused_rows.h"
#include "backend/cpu/top_k.h"
#include "backend/mlp_beside.h"
#include "util/error.h"

namespace pydiffusion {

void* GraphMemory::reserve(size_t n_bytes) {
    if (n_bytes_ < n_bytes || n_bytes_ > 2 * n_bytes) {  // not much more than needed: memory may be short
        memory_.reset();
        memory_.reset(std::malloc(n_bytes));
        n_bytes_ = memory_ ? n_bytes : 0;
    }
    return memory_.get();
}

GraphBuilder::GraphBuilder(const Model& m, std::vector<Sequence> s, GraphMemory* memory)
    : model(m), sequences(std::move(s)) {
    const size_t n_nodes =
        (128 + 2 * m.hparams.n_expert_used + 24 * sequences.size()) * m.hparams.layers.size() + 64 +
        16 * sequences.size();
    ggml_init_params params = {n_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false),
                               nullptr, true};
    require_memory((size_t{16} << 20) + 4 * params.mem_size);  // the allocator's tables need memory too
    if (memory) params.mem_buffer = memory->reserve(params.mem_size);
    if (!memory || params.mem_buffer) context.reset(ggml_init(params));
    if (!context) throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate a graph");
    graph = ggml_new_graph_custom(ctx(), n_nodes, false);
    matmul.emplace(ctx(), model.backend.kernel(), uses_ggml_ops(), fuses_rows());
    if (!uses_ggml_ops()) return;
    expert_matmuls.emplace(ctx(), model.backend);
    // Tokens and positions; of both layer kinds masks and angles.
    const size_t n_inputs = 4 + 2 * sequences.size();
    positions_.resize(model.backend.n_devices() + 1);
    for (int32_t device = kCpuDevice; device < model.backend.n_devices(); ++device) {
        input_contexts_.emplace_back(ggml_init({n_inputs * ggml_tensor_overhead(), nullptr, true}));
        if (!input_contexts_.back())
            throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate the inputs of a graph");
    }
}

ggml_tensor* GraphBuilder::rms_norm(ggml_tensor* x, ggml_tensor* weight, ggml_type type) const {
    if (fuses_rows()) return pydiffusion::rms_norm(ctx(), x, weight, &model.hparams.rms_eps, type);
    ggml_tensor* n = ggml_rms_norm(ctx(), x, model.hparams.rms_eps);
    return weight ? ggml_mul(ctx(), n, weight) : n;
}

ggml_tensor* GraphBuilder::gated_gelu(ggml_tensor* gate, ggml_tensor* up, ggml_type type) const {
    return fuses_rows() ? pydiffusion::gated_gelu(ctx(), gate, up, type)
                        : ggml_ops::gated_gelu(ctx(), gate, up);
}

ggml_tensor* GraphBuilder::concat_tokens(const std::vector<ggml_tensor*>& parts) const {
    if (!uses_ggml_ops()) return stack_tokens(ctx(), parts);
    ggml_tensor* all = parts[0];
    for (size_t i = 1; i < parts.size(); ++i) all = ggml_concat(ctx(), all, parts[i], 1);
    return all;
}

ggml_tensor* GraphBuilder::add_normed(ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight) const {
    if (!fuses_rows()) return ggml_add(ctx(), x, rms_norm(branch, weight));
    return pydiffusion::add_normed(ctx(), x, branch, weight, &model.hparams.rms_eps);
}

ggml_tensor* GraphBuilder::norm_and_rope(ggml_tensor* x, ggml_tensor* weight, int32_t i_layer,
                                         int64_t first) {
    if (fuses_rows()) {
        ggml_tensor* own = angles(x->ne[0], i_layer, first, x->ne[2]);
        return pydiffusion::rotate_normed(ctx(), x, weight, own, &model.hparams.rms_eps);
    }
    const bool sliding = model.hparams.layers[i_layer].sliding;
    // An operation's inputs must be in the memory of its device.
    const int32_t device = model.device_plan.layer_device(i_layer);
    ggml_tensor*& positions = positions_[device - kCpuDevice];
    if (!positions) positions = new_input_on(device, GGML_TYPE_I32, n_tokens(), 1);
    ggml_tensor* own = ggml_view_1d(ctx(), positions, x->ne[2], first * positions->nb[0]);
    const Hparams& hp = model.hparams;
    ggml_tensor* factors = sliding ? nullptr : model.weights.rope_freqs[device - kCpuDevice];
    return ggml_rope_ext(ctx(), rms_norm(x, weight), own, factors, static_cast<int>(x->ne[0]),
                         GGML_ROPE_TYPE_NEOX, hp.n_ctx_train, sliding ? hp.rope_base_swa : hp.rope_base, 1.0f,
                         0.0f, 1.0f, 0.0f, 0.0f);
}

ggml_tensor* GraphBuilder::angles(int64_t head_dim, int32_t i_layer, int64_t first, int64_t n) {
    const bool sliding = model.hparams.layers[i_layer].sliding;
    const int32_t device = model.device_plan.layer_device(i_layer);
    auto found = std::find_if(angles_.begin(), angles_.end(), [&](const Angles& a) {
        return a.sliding == sliding && a.device == device && a.tensor->ne[0] == head_dim;
    });
    if (found == angles_.end()) {
        ggml_tensor* all = uses_ggml_ops() ? new_input_on(device, GGML_TYPE_F32, head_dim, n_tokens())
                                           : new_input(GGML_TYPE_F32, head_dim, n_tokens());
        found = angles_.insert(found, {sliding, device, all});
    }
    ggml_tensor* all = found->tensor;
    return ggml_view_2d(ctx(), all, head_dim, n, all->nb[1], first * all->nb[1]);
}

ggml_tensor* GraphBuilder::cache_heads(ggml_tensor* cache, int64_t head_dim, int64_t first, int64_t n) const {
    return ggml_view_3d(ctx(), cache, head_dim, cache->ne[0] / head_dim, n,
                        ggml_row_size(cache->type, head_dim), cache->nb[1], first * cache->nb[1]);
}

ggml_tensor* GraphBuilder::rotate_and_store(ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, int32_t i_layer,
                                            int64_t first, const KvRange& range) {
    const LayerWeights& w = model.weights.layers[i_layer];
    const int64_t head_dim = q->ne[0], n = q->ne[2];
    if (uses_ggml_ops() && fuses_rows() && !ggml_is_quantized(range.k->type)) {
        const CacheRows rows = {k, w.attn_k_norm, v, cache_heads(range.k, head_dim, range.write, n),
                                cache_heads(range.v, head_dim, range.write, n)};
        ggml_tensor* own = angles(head_dim, i_layer, first, n);
        q = pydiffusion::rotate_and_store(ctx(), q, w.attn_q_norm, own, rows, &model.hparams.rms_eps);
        ggml_build_forward_expand(graph, q);  // before whatever reads the cache
        return q;
    }
    store_normed(k, w.attn_k_norm, i_layer, first, range.k, range.write);
    store_normed(v, nullptr, i_layer, first, range.v, range.write);
    return norm_and_rope(q, w.attn_q_norm, i_layer, first);
}

void GraphBuilder::store_normed(ggml_tensor* x, ggml_tensor* weight, int32_t i_layer, int64_t first,
                                ggml_tensor* cache, int64_t row) {
    const int64_t head_dim = x->ne[0], n = x->ne[2];
    ggml_tensor* stored;
    if (uses_ggml_ops() && fuses_rows() && !ggml_is_quantized(cache->type)) {
        ggml_tensor* target = cache_heads(cache, head_dim, row, n);
        ggml_tensor* own = weight ? angles(head_dim, i_layer, first, n) : nullptr;
        stored = pydiffusion::store_normed(ctx(), x, weight, own, &model.hparams.rms_eps, target);
    } else {
        ggml_tensor* normed = weight ? norm_and_rope(x, weight, i_layer, first) : rms_norm(x);
        ggml_tensor* target = ggml_view_2d(ctx(), cache, cache->ne[0], n, cache->nb[1], row * cache->nb[1]);
        stored = ggml_cpy(ctx(), ggml_reshape_2d(ctx(), normed, cache->ne[0], n), target);
    }
    ggml_build_forward_expand(graph, stored);
}

int64_t GraphBuilder::n_tokens() const {
    int64_t n = 0;
    for (const Sequence& sequence : sequences) n += sequence.n_tokens;
    return n;
}

namespace {

// Angle i of a token is position / (base^(2 i / head_dim) * factor[i]), rounded as in the reference.
void write_angles(ggml_tensor* tensor, const std::vector<int32_t>& positions, float base,
                  const std::vector<float>& factors) {
    const int64_t head_dim = tensor->ne[0], half = head_dim / 2;
    const bool on_host = ggml_backend_buffer_is_host(tensor->buffer);
    std::vector<float> values(on_host ? 0 : head_dim * positions.size());
    float* row = on_host ? static_cast<float*>(tensor->data) : values.data();
    for (const int32_t position : positions) {
        for (int64_t i = 0; i < half; ++i) {
            const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
            const float frequency = 1.0f / (std::pow(base, exponent) * (factors.empty() ? 1.0f : factors[i]));
            const float angle = static_cast<float>(position) * frequency;
            row[i] = std::cos(angle);
            row[half + i] = std::sin(angle);
        }
        row += head_dim;
    }
    if (!on_host) ggml_backend_tensor_set(tensor, values.data(), 0, values.size() * sizeof(float));
}

}  // namespace

void GraphBuilder::set_positions(const std::vector<int32_t>& positions) {
    if (positions == written_positions_) return;
    written_positions_ = positions;
    for (ggml_tensor* on_device : positions_) {
        if (on_device)
            ggml_backend_tensor_set(on_device, positions.data(), 0, positions.size() * sizeof(int32_t));
    }
    const Hparams& hp = model.hparams;
    for (const Angles& a : angles_) {
        write_angles(a.tensor, positions, a.sliding ? hp.rope_base_swa : hp.rope_base,
                     a.sliding ? std::vector<float>() : model.weights.rope_factors);
    }
}

ggml_tensor* GraphBuilder::new_input(ggml_type type, int64_t n0, int64_t n1) {
    if (uses_ggml_ops()) return new_input_on(model.backend.n_devices() - 1, type, n0, n1);
    ggml_tensor* input = ggml_new_tensor_2d(ctx(), type, n0, n1);
    ggml_set_input(input);
    ggml_set_output(input);  // else the allocator reuses its memory after the last read
    return input;
}

ggml_tensor* GraphBuilder::new_input_on(int32_t device, ggml_type type, int64_t n0, int64_t n1) {
    return ggml_new_tensor_2d(input_contexts_[device - kCpuDevice].get(), type, n0, n1);
}

void GraphBuilder::pin_to_device_of(const ggml_tensor* weight, ggml_tensor* tensor) {
    if (!model.device_plan.single_device()) pinned_.emplace_back(tensor, weight);
}

void GraphBuilder::pin_to_device_of(const ggml_tensor* weight, int first_node) {
    for (int i = first_node; i < ggml_graph_n_nodes(graph); ++i)
        pin_to_device_of(weight, ggml_graph_node(graph, i));
}

void GraphBuilder::allocate(GraphExecutor& executor, const char* what) const {
    executor.allocate(graph, input_contexts_, pinned_, what);
    for (const MaskKey& key : masks_) ggml_ops::fill(key.mask);
}

ggml_ops::Mask GraphBuilder::mask(size_t i_sequence, int32_t i_layer, int64_t n_visible,
                                  const Causal* causal) {
    const bool sliding = model.hparams.layers[i_layer].sliding;
    const int32_t device = model.device_plan.layer_device(i_layer);
    for (const MaskKey& key : masks_) {
        if (key.i_sequence == i_sequence && key.device == device && key.sliding == sliding) return key.mask;
    }
    ggml_tensor* tensor =
        new_input_on(device, GGML_TYPE_F16, ggml_ops::pad_to_mask(n_visible), sequences[i_sequence].n_tokens);
    masks_.push_back({i_sequence, device, sliding, {tensor, n_visible, causal}});
    return masks_.back().mask;
}

ggml_tensor* GraphBuilder::multiply_experts(ggml_tensor* weights, ggml_tensor* x, ggml_tensor* experts) {
    ggml_tensor* result = expert_matmuls ? expert_matmuls->apply(weights, x, experts) : nullptr;
    return result ? result : matmul->apply(weights, x, experts);
}

ggml_tensor* GraphBuilder::mlp(ggml_tensor* x, ggml_tensor* norm, ggml_tensor* gate, ggml_tensor* up,
                               ggml_tensor* gate_up, ggml_tensor* down, bool beside_experts) {
    const ggml_type type = matmul->activation_type({gate, up, down});
    if (beside_experts && gate_up && type == GGML_TYPE_BF16 && model.backend.computes_mlp_beside())
        return mlp_beside(ctx(), x, norm, gate_up, down, &model.hparams.rms_eps);
    ggml_tensor* h = rms_norm(x, norm, matmul->activation_type({gate, up}));
    ggml_tensor *gates, *ups;
    if (gate_up && fuses_rows()) {
        ggml_tensor* both = matmul->apply(gate_up, h);
        gates = ggml_view_2d(ctx(), both, gate->ne[1], both->ne[1], both->nb[1], 0);
        ups = ggml_view_2d(ctx(), both, up->ne[1], both->ne[1], both->nb[1], gates->nb[0] * gate->ne[1]);
    } else {
        gates = matmul->apply(gate, h);
        ups = matmul->apply(up, h);
    }
    return matmul->apply(down, gated_gelu(gates, ups, matmul->activation_type({down})));
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

}  // namespace pydiffusion
