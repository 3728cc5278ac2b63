#include "runtime/denoiser.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <functional>
#include <limits>

#include "backend/attention_node.h"
#include "backend/cpu/attention.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/measure_logits.h"
#include "backend/cpu/top_k.h"
#include "backend/expert_nodes.h"
#include "backend/mlp_beside.h"
#include "backend/step_backend.h"
#include "ggml-impl.h"
#include "model/architecture.h"
#include "util/error.h"
#include "util/timer.h"

namespace pydiffusion {

namespace {

// ggml's name of an operation, or the node's name for a custom one.
const char* operation_name(const ggml_tensor* node) {
    return node->op == GGML_OP_CUSTOM ? node->name : ggml_op_name(node->op);
}

}  // namespace

CanvasState::CanvasState(const Model& model) : model_(model) {
    const Hparams& hp = model.hparams;
    const ggml_init_params params = {3 * ggml_tensor_overhead(), nullptr, true};
    context_.reset(ggml_init(params));
    if (!context_)
        throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate the logits' tensors");
    logits_ = ggml_new_tensor_2d(context_.get(), GGML_TYPE_F32, hp.n_vocab, hp.canvas_length);
    if (model.backend.on_device()) {
        soft_ = ggml_new_tensor_2d(context_.get(), GGML_TYPE_F32, hp.n_embd, hp.canvas_length);
        step_.sums = ggml_new_tensor_2d(context_.get(), GGML_TYPE_F32, n_sums(hp.n_vocab), hp.canvas_length);
    }
    buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(context_.get(), model.backend.buffer_type()));
    if (!buffer_) {
        throw Error(ErrorKind::out_of_memory,
                    format("out of memory: failed to allocate %.1f MB for the logits of a canvas",
                           static_cast<double>(ggml_nbytes(logits_)) / 1e6));
    }
    use_large_pages(buffer_.get());
    step_.soft_cap = hp.soft_cap;
    step_.kernel = model.backend.kernel();
    step_.embedding_scale = model.embedding_scale();
    step_.u.assign(hp.canvas_length, 0.0f);
    step_.measures.resize(hp.canvas_length);
    step_.normalizers.resize(hp.canvas_length);
}

Candidates CanvasState::candidates(int64_t n, int32_t k, const std::vector<int32_t>& extra) const {
    if (soft_) return model_.backend.step_backend().candidates(logits_, n, k, extra);
    Candidates found;
    const int64_t n_vocab = model_.hparams.n_vocab;
    const auto* logits = static_cast<const float*>(logits_->data);
    for (int64_t t = 0; t < n; ++t) add_candidates(found, logits + t * n_vocab, n_vocab, k, extra);
    return found;
}

void CanvasState::copy_logits(float* target) const {
    ggml_backend_tensor_get(logits_, target, 0, ggml_nbytes(logits_));
}

void CanvasState::set_logits(const float* logits) {
    ggml_backend_tensor_set(logits_, logits, 0, ggml_nbytes(logits_));
    std::fill(step_.normalizers.begin(), step_.normalizers.end(), Normalizer{});
    step_.n_summed = 0;
}

void CanvasState::pin(int64_t position, int32_t token) {
    const Hparams& hp = model_.hparams;
    if (soft_) {
        const auto lock = model_.backend.lock_devices();
        model_.backend.step_backend().pin(logits_, position, token, hp.soft_cap, step_);
        return;
    }
    float* row = static_cast<float*>(logits_->data) + position * hp.n_vocab;
    std::fill_n(row, hp.n_vocab, -std::numeric_limits<float>::infinity());
    row[token] = hp.soft_cap;
    step_.normalizers[position] = {};
}

void CanvasState::condition(const ggml_tensor* embedding, int64_t n_tokens) {
    if (soft_) model_.backend.step_backend().condition(logits_, embedding, soft_, n_tokens, step_);
}

void CanvasState::measure(int64_t n_tokens) {
    if (soft_) model_.backend.step_backend().measure(logits_, n_tokens, step_);
}

void CanvasState::require_finite(size_t n, bool adapted) const {
    const char* adapters = adapted ? "the adapters' changes at their scales, " : "";
    for (size_t i = 0; i < n; ++i) {
        if (std::isnan(step_.measures[i].entropy)) {
            throw Error(
                ErrorKind::general,
                format("the logits of canvas position %zu are NaN or infinite: %sthe model's weights or the "
                       "self-conditioning logits are not finite",
                       i, adapters));
        }
    }
}

namespace {

ggml_tensor* first_tokens(const GraphBuilder& g, ggml_tensor* x, int64_t n) {
    return ggml_view_2d(g.ctx(), x, x->ne[0], n, x->nb[1], 0);
}

}  // namespace

// Soft embedding of a slot's last step; on a device, condition() has computed it before the graph runs.
ggml_tensor* Denoiser::soft_embedding_of(GraphBuilder& g, CanvasState& state, int64_t n_tokens) {
    if (state.soft_) return first_tokens(g, state.soft_, n_tokens);
    ggml_tensor* logits = first_tokens(g, state.logits_, n_tokens);
    ggml_tensor* probabilities = soft_probabilities(g.ctx(), logits, &state.step_);
    return soft_embedding(g.ctx(), probabilities, model_.weights.token_embd.tensor, &state.step_);
}

// Input of the first layer: embedded tokens plus self-conditioning on the previous step, slot by slot.
ggml_tensor* Denoiser::embed_slots(GraphBuilder& g, const std::vector<Slot>& slots) {
    g.begin_part("self-conditioning");
    std::vector<ggml_tensor*> parts;
    for (const Slot& slot : slots) parts.push_back(soft_embedding_of(g, *slot.state, slot.n_tokens()));
    return model_.hparams.architecture->embed_canvas(g, canvas_, g.ops->concat_tokens(parts));
}

// The head writes directly to the slot's logits: the step has already consumed the previous ones.
void Denoiser::finish_slot(GraphBuilder& g, CanvasState& state, ggml_tensor* x) {
    g.begin_part("head");
    ggml_tensor* head = g.logits(x, state.logits_);
    g.begin_part("sampler");
    if (!state.soft_) head = cap_and_measure(g.ctx(), head, &state.step_);
    ggml_build_forward_expand(g.graph, head);
}

void Denoiser::build(const std::vector<Slot>& slots, GraphExecutor& executor) {
    const Hparams& hp = model_.hparams;
    std::vector<Sequence> sequences;
    canvases_.clear();
    for (const Slot& slot : slots) {
        sequences.push_back({slot.cache, slot.n_tokens(), slot.n_frozen, {}, &slot.adapters});
        canvases_.emplace_back(slot.state, slot.n_tokens());
    }
    built_.reset();
    built_ = std::make_unique<GraphBuilder>(model_, Mode::decoder, std::move(sequences), &graph_memory_);
    GraphBuilder& g = *built_;
    g.trace = trace_;
    if (trace_) trace_->begin_graph();
    canvas_ = g.new_tokens(g.n_tokens());
    if (imatrix_) g.ops->keep_activations();
    ggml_tensor* x = embed_slots(g, slots);
    g.keep("input", 0, x);
    for (int32_t i = 0; i < hp.n_layer; ++i) x = hp.architecture->layer(g, i, x);
    int64_t first = 0;
    for (const Slot& slot : slots) {
        const int64_t n = slot.n_tokens();
        finish_slot(g, *slot.state, ggml_view_2d(g.ctx(), x, x->ne[0], n, x->nb[1], first * x->nb[1]));
        first += n;
    }
    if (imatrix_) imatrix_->keep_inputs(g.graph);
    g.allocate(executor, "the buffers of a denoising step");
}

std::map<std::string, int> Denoiser::ops() const {
    std::map<std::string, int> counts;
    for (int i = 0; built_ && i < ggml_graph_n_nodes(built_->graph); ++i) {
        counts[operation_name(ggml_graph_node(built_->graph, i))] += 1;
    }
    return counts;
}

namespace {

void count_work(const ggml_tensor* node, Denoiser::PartCost& cost) {
    const ggml_tensor *a = node->src[0], *b = node->src[1];
    if (const ggml_tensor* weight = gemm::matmul_operands(node).weight) {
        cost.operations +=
            2.0 * static_cast<double>(weight->ne[0]) * static_cast<double>(ggml_nelements(node));
        cost.bytes += static_cast<double>(ggml_nbytes(weight));
        return;
    }
    if (const LowRankWork work = low_rank_work(node); work.factor) {
        cost.operations += 2.0 * static_cast<double>(work.factor->ne[0] * work.factor->ne[1] * work.n);
        cost.bytes += static_cast<double>(ggml_nbytes(work.factor));
        return;
    }
    switch (node->op) {
        case GGML_OP_FLASH_ATTN_EXT:
            cost.operations += 4.0 * static_cast<double>(ggml_nelements(a)) * static_cast<double>(b->ne[1]);
            cost.bytes += 2.0 * static_cast<double>(ggml_nbytes(b));
            break;
        case GGML_OP_CUSTOM:
            if (is_attention(node)) {  // Q K^T, and softmax times V
                cost.operations +=
                    4.0 * static_cast<double>(ggml_nelements(node)) * static_cast<double>(b->ne[1]);
                cost.bytes += 2.0 * static_cast<double>(ggml_nelements(b) / ggml_blck_size(b->type)) *
                              static_cast<double>(ggml_type_size(b->type));
            } else if (is_route(node)) {
                cost.operations +=
                    2.0 * static_cast<double>(ggml_nelements(a)) * static_cast<double>(b->ne[1]);
                cost.bytes += static_cast<double>(ggml_nbytes(a));
            } else if (is_attend_by_kernel(node)) {
                cost.operations +=
                    4.0 * static_cast<double>(ggml_nelements(a)) * static_cast<double>(b->ne[1]);
                cost.bytes += 2.0 * static_cast<double>(ggml_nbytes(b));
            } else if (expert_node_of(node) == ExpertNode::multiply ||
                       expert_node_of(node) == ExpertNode::multiply_gated) {
                const ggml_tensor* experts = node->src[3];
                cost.operations += 2.0 * static_cast<double>(a->ne[0] * a->ne[1]) *
                                   static_cast<double>(ggml_nelements(experts));
                cost.bytes += static_cast<double>(ggml_nbytes(a));
            } else if (is_mlp_beside(node)) {
                for (const ggml_tensor* weight : {node->src[1], node->src[2]}) {
                    cost.operations +=
                        2.0 * static_cast<double>(ggml_nelements(weight)) * static_cast<double>(a->ne[1]);
                    cost.bytes += static_cast<double>(ggml_nbytes(weight));
                }
            } else if (is_soft_embedding(node)) {  // dense
                cost.operations +=
                    2.0 * static_cast<double>(b->ne[1]) * static_cast<double>(ggml_nelements(node));
                cost.bytes += static_cast<double>(ggml_nbytes(b));
            }
            break;
        default:
            break;
    }
}

}  // namespace

std::map<std::string, Denoiser::PartCost> Denoiser::profile(GraphExecutor& executor,
                                                            const std::atomic<bool>& cancel,
                                                            bool by_operation) {
    if (!built_ || built_for_.empty())
        throw Error(ErrorKind::argument, "no step to profile: run a denoising step first");
    if (!model_.device_plan.single_device())
        throw Error(ErrorKind::unsupported,
                    "profiling is not supported for a model that is split across devices");
    const auto lock = model_.backend.lock_devices();
    std::map<std::string, PartCost> costs;
    const int n_nodes = ggml_graph_n_nodes(built_->graph);
    const auto part_of = [&](const ggml_tensor* node) {
        return std::string(by_operation ? operation_name(node) : built_->part_of(node));
    };
    const auto time = [&](const std::function<void()>& work) {
        return model_.backend.on_device() ? model_.backend.step_backend().seconds_of(work) : seconds_of(work);
    };
    // Parts are graphs of their own: what one of them begins must end in it.
    struct InTurn {
        explicit InTurn(const Backend& b) : backend(b) { backend.set_in_turn(true); }
        ~InTurn() { backend.set_in_turn(false); }
        const Backend& backend;
    };
    const InTurn in_turn(model_.backend);
    for (int first = 0, end = 0; first < n_nodes; first = end) {
        const std::string part = part_of(ggml_graph_node(built_->graph, first));
        PartCost& cost = costs[part];
        for (; end < n_nodes && part == part_of(ggml_graph_node(built_->graph, end)); ++end)
            count_work(ggml_graph_node(built_->graph, end), cost);
        // A graph view keeps the nodes' use counts, which ggml needs for fusion.
        ggml_cgraph nodes = ggml_graph_view(built_->graph, first, end);
        cost.seconds += time([&] { executor.compute_nodes(&nodes, [&] { return cancel.load(); }); });
    }
    if (!model_.backend.on_device()) return costs;
    // In this order, as in the next step: measure() caps the logits just computed, condition() reads them
    // capped.
    const double row_bytes = sizeof(float) * static_cast<double>(model_.hparams.n_vocab);
    for (const auto& [canvas, n] : canvases_) {
        PartCost &conditioning = costs["self-conditioning"], &sampler = costs["sampler"];
        sampler.seconds += time([canvas = canvas, n = n] { canvas->measure(n); });
        sampler.bytes += 2.0 * row_bytes * static_cast<double>(n);
        canvas->step().previous_temperature = canvas->step().temperature;
        conditioning.seconds +=
            time([&, canvas = canvas, n = n] { canvas->condition(model_.weights.token_embd.tensor, n); });
        conditioning.bytes += sizeof(float) * static_cast<double>(n * n_sums(model_.hparams.n_vocab));
    }
    return costs;
}

namespace {

// Waits for a graph that was launched when an error ends what should have come after it: what it reads and
// writes may be changed then.
class FinishedAfterError {
  public:
    explicit FinishedAfterError(GraphExecutor& executor)
        : executor_(executor), n_exceptions_(std::uncaught_exceptions()) {}
    ~FinishedAfterError() {
        if (std::uncaught_exceptions() > n_exceptions_) executor_.finish();
    }
    FinishedAfterError(const FinishedAfterError&) = delete;
    FinishedAfterError& operator=(const FinishedAfterError&) = delete;

  private:
    GraphExecutor& executor_;
    const int n_exceptions_;
};

}  // namespace

void Denoiser::step(const std::vector<Slot>& slots, GraphExecutor& executor) {
    const auto lock = model_.backend.lock_devices();
    const auto versions = [&] {
        decltype(built_for_) result;
        for (const Slot& slot : slots)
            result.emplace_back(slot.cache->version(), slot.n_tokens(), slot.n_frozen, slot.adapters);
        return result;
    };
    if (built_for_ != versions()) {
        invalidate();
        for (const Slot& slot : slots)
            slot.cache->prepare(static_cast<int32_t>(slot.n_tokens() + slot.n_frozen));
        build(slots, executor);
        built_for_ = versions();
    }
    std::vector<int32_t> tokens, positions;
    for (const Slot& slot : slots) {
        tokens.insert(tokens.end(), slot.canvas->begin(), slot.canvas->end());
        for (int32_t i = 0; i < slot.n_tokens(); ++i) positions.push_back(slot.cache->n_past() + i);
    }
    model_.file->require_not_truncated();
    ggml_backend_tensor_set(canvas_, tokens.data(), 0, tokens.size() * sizeof(int32_t));
    built_->set_positions(positions);
    for (const Slot& slot : slots) slot.state->condition(model_.weights.token_embd.tensor, slot.n_tokens());
    for (const Slot& slot : slots) slot.state->step_.n_summed = 0;  // the graph overwrites the logits
    const FinishedAfterError running(executor);
    executor.launch(built_->graph, [&] {  // measure() comes after it
        return std::all_of(slots.begin(), slots.end(), [](const Slot& slot) { return slot.cancel->load(); });
    });
    for (const Slot& slot : slots) slot.state->measure(slot.n_tokens());
    if (imatrix_) imatrix_->add(built_->graph);
    if (trace_) trace_->read();
}

}  // namespace pydiffusion
