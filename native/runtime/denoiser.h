// Denoiser: one denoising step over one or several canvases with bidirectional attention. Reads the KV caches
// but never appends to them.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "backend/cpu/self_conditioning.h"
#include "backend/graph_executor.h"
#include "graph/graph_builder.h"
#include "quantization/imatrix_collector.h"

namespace pydiffusion {

// Inputs and outputs of a canvas's denoising step. Its logits are the next step's self-conditioning.
class CanvasState {
  public:
    explicit CanvasState(const Model& model);

    // Soft-capped logits of the last step, n_vocab floats per position.
    void copy_logits(float* target) const;
    // See Candidates; of the first n positions.
    Candidates candidates(int64_t n, int32_t k, const std::vector<int32_t>& extra) const;
    // Replaces them, n_vocab * canvas_length floats, as self-conditioning for the next step.
    void set_logits(const float* logits);
    // Makes the next step's self-conditioning treat this token as certain.
    void pin(int64_t position, int32_t token);
    StepState& step() { return step_; }

    // Throws Error(general) if the last step's logits of the first n positions are not all finite. adapted:
    // whether adapters may be why.
    void require_finite(size_t n, bool adapted) const;

  private:
    friend class Denoiser;

    // Run a device's kernels. No-ops on the CPU, where nodes of the graph do the same.
    void condition(const ggml_tensor* embedding, int64_t n_tokens);
    void measure(int64_t n_tokens);

    const Model& model_;
    StepState step_;
    ggml_context_ptr context_;
    ggml_backend_buffer_ptr buffer_;
    ggml_tensor* logits_ = nullptr;  // F32 [n_vocab, canvas_length]
    ggml_tensor* soft_ = nullptr;    // devices: F32 [n_embd, canvas_length], the soft embedding
};

class Denoiser {
  public:
    explicit Denoiser(const Model& model) : model_(model) {}

    struct Slot {
        CanvasState* state;  // step() holds the inputs, then the measures
        KvCache* cache;
        const std::vector<int32_t>* canvas;  // at the positions after the cache, at most canvas_length
        const std::atomic<bool>* cancel;     // set when the result is no longer needed
        // Positions after the canvas that are visible as the last step left them but no longer denoised.
        int64_t n_frozen = 0;
        AdapterList adapters{};  // those that change anything

        int64_t n_tokens() const { return static_cast<int64_t>(canvas->size()); }
    };

    // Runs one step on all slots' canvases in one graph, which is reused by the next step if it has the same
    // slots in the same order. Throws Error(cancelled) soon after all slots are cancelled.
    void step(const std::vector<Slot>& slots, GraphExecutor& executor);

    // Runs the last step again, part by part, and returns the cost of each, timed on a GPU by its own clock.
    // Leaves the logits invalid. With by_operation the parts are the names of ops(), so a device can't fuse
    // operations of different names. Only for models on a single device.
    struct PartCost {
        double seconds = 0.0;
        double operations = 0.0;  // multiplications and additions in matmuls and attention
        double bytes = 0.0;       // of weights, K and V read
    };
    std::map<std::string, PartCost> profile(GraphExecutor& executor, const std::atomic<bool>& cancel,
                                            bool by_operation);

    // Discards the graph; required after the executor ran another one.
    void invalidate() { built_for_.clear(); }

    // Collects the activations of every following step, until called with null.
    void observe(ImatrixCollector* imatrix) {
        imatrix_ = imatrix;
        invalidate();
    }

    // Keeps values of the layers of every following step, until called with null.
    void trace(LayerTrace* trace) {
        trace_ = trace;
        invalidate();
    }

    // Node counts of the last graph by operation: ggml's name, or the node's name for custom operations.
    // Empty before the first step.
    std::map<std::string, int> ops() const;

  private:
    void build(const std::vector<Slot>& slots, GraphExecutor& executor);
    ggml_tensor* soft_embedding_of(GraphBuilder& g, CanvasState& state, int64_t n_tokens);
    ggml_tensor* embed_slots(GraphBuilder& g, const std::vector<Slot>& slots);
    void finish_slot(GraphBuilder& g, CanvasState& state, ggml_tensor* x);

    const Model& model_;
    ImatrixCollector* imatrix_ = nullptr;
    LayerTrace* trace_ = nullptr;
    GraphMemory graph_memory_;  // of built_
    std::unique_ptr<GraphBuilder> built_;
    // Per slot: cache version, canvas length, frozen positions, adapters. The slots of a step own these: an
    // idle graph keeps none in memory, and is not computed again once one is gone.
    std::vector<std::tuple<uint64_t, int64_t, int64_t, AdapterMarks>> built_for_;
    std::vector<std::pair<CanvasState*, int64_t>> canvases_;  // of the graph, with canvas lengths
    ggml_tensor* canvas_ = nullptr;
};

}  // namespace pydiffusion
