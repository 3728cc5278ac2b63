#include "vision/vision_graph.h"

#include "backend/ops/cpu_ops.h"
#include "backend/ops/ggml_ops.h"

namespace pydiffusion {

namespace {

constexpr size_t kNodesPerLayer = 96, kOtherNodes = 64;
constexpr size_t kInputs = 8;  // of a graph at most: values, positions of the embedding and of the layers

std::unique_ptr<Ops> make_vision_ops(const OpsContext& context) {
    if (context.backend.on_device()) return std::make_unique<GgmlOps>(context);
    return std::make_unique<CpuOps>(context, context.backend.kernel_for_many());
}

}  // namespace

VisionGraph::VisionGraph(const Model& model, const VisionHparams& hparams, const VisionWeights& weights,
                         int64_t n_tokens)
    : hp_(hparams), weights_(weights), n_tokens_(n_tokens), device_(model.device_plan.main_device()) {
    const size_t n_nodes = kNodesPerLayer * hparams.n_layer + kOtherNodes;
    context_ = new_graph_context(n_nodes);
    graph_ = ggml_new_graph_custom(ctx(), n_nodes, false);
    inputs_ = std::make_unique<GraphInputs>(ctx(), model.backend, kInputs);
    ops_ = make_vision_ops({ctx(), graph_, model.backend, *inputs_, n_tokens, &hp_.rms_eps, true});
}

ggml_tensor* VisionGraph::new_input(int64_t n0) {
    return inputs_->add(device_, GGML_TYPE_F32, n0, n_tokens_);
}

ggml_tensor* VisionGraph::embed(ggml_tensor* patches) {
    axes_.add(*inputs_, device_, n_tokens_);
    ggml_tensor* kernel = ggml_reshape_2d(ctx(), weights_.patch_embd, hp_.patch_elements(), hp_.n_embd);
    const auto table = [&](int64_t axis) {
        ggml_tensor* all = weights_.position_embd;
        return ggml_view_2d(ctx(), all, all->ne[0], all->ne[1], all->nb[1], axis * all->nb[2]);
    };
    ggml_tensor* x = ops_->matmul({kernel}, patches);
    x = ggml_add(ctx(), x, ggml_get_rows(ctx(), table(0), axes_.x));
    return ggml_add(ctx(), x, ggml_get_rows(ctx(), table(1), axes_.y));
}

ggml_tensor* VisionGraph::limited(ggml_tensor* x, const Bounds& bounds) {
    if (!bounds.any()) return x;
    for (const Limited& known : limited_) {
        if (known.x == x && known.bounds.low == bounds.low && known.bounds.high == bounds.high)
            return known.result;
    }
    limited_.push_back({x, bounds, ops_->limit(x, bounds.low, bounds.high)});
    return limited_.back().result;
}

ggml_tensor* VisionGraph::multiply(const ClippedMatrix& w, ggml_tensor* x) {
    return limited(ops_->matmul(w.matrix, limited(x, w.input)), w.output);
}

ggml_tensor* VisionGraph::heads(const ClippedMatrix& w, ggml_tensor* x) {
    return ggml_reshape_3d(ctx(), multiply(w, x), hp_.head_dim, hp_.n_head, n_tokens_);
}

ggml_tensor* VisionGraph::layer(const VisionLayer& w, ggml_tensor* x) {
    const Rope rope = {device_, hp_.rope_theta, 0};
    ggml_tensor* h = ops_->rms_norm(x, w.ln1);
    const Heads own = {ops_->rotate_axes(heads(w.attn_q, h), w.attn_q_norm, rope),
                       ops_->rotate_axes(heads(w.attn_k, h), w.attn_k_norm, rope),
                       ops_->rms_norm(heads(w.attn_v, h))};
    ggml_tensor* a = multiply(w.attn_out, ops_->attend_all(own, weights_.exact, w.attn_out.matrix));
    ggml_tensor* r = ops_->add_normed(x, a, w.attn_post_norm);

    h = ops_->rms_norm(r, w.ln2);
    ggml_tensor* gate = multiply(w.ffn_gate, h);
    ggml_tensor* up = multiply(w.ffn_up, h);
    ggml_tensor* mlp = multiply(w.ffn_down, ops_->gated_gelu(gate, up));
    return ops_->add_normed(r, mlp, w.ffn_post_norm);
}

std::vector<float> VisionGraph::compute(GraphExecutor& executor, ggml_tensor* result, ggml_tensor* input,
                                        const std::vector<float>& values,
                                        const std::vector<AxialPosition>& positions) {
    ggml_set_output(result);
    ggml_build_forward_expand(graph_, result);
    executor.allocate(graph_, inputs_->contexts(), ops_->pinned(), "encoding an image");
    ggml_backend_tensor_set(input, values.data(), 0, values.size() * sizeof(float));
    axes_.write(positions);
    ops_->set_axial_positions(positions);
    executor.compute(graph_, [] { return false; });
    std::vector<float> computed(ggml_nelements(result));
    ggml_backend_tensor_get(result, computed.data(), 0, ggml_nbytes(result));
    return computed;
}

}  // namespace pydiffusion
