// Bidirectional mode: one denoising step over one canvas or several, reading the caches and never adding to
// them.
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
#include "quant/imatrix_collector.h"

namespace pydiffusion {

// What a canvas takes into a step and gets out of it. Its logits condition the next step.
class CanvasState {
  public:
    explicit CanvasState(const Model& model);

    // Logits of the last step, soft-capped, position by position: n_vocab floats each. The next step
    // overwrites them, and where a device computes, the next call too.
    const float* logits();
    // Puts others in their place, n_vocab times canvas_length, for the next step to be conditioned on.
    void set_logits(const float* logits);
    // The next step is conditioned on this token as on one that the model is sure of.
    void pin(int64_t position, int32_t token);
    StepState& step() { return step_; }

    // Throws Error(general) when the last step's logits of the first n positions are not finite.
    void require_finite(size_t n) const;

  private:
    friend class Denoiser;

    void condition(const ggml_tensor* embedding, int64_t n_tokens);  // on a device
    void measure(int64_t n_tokens);

    const Model& model_;
    StepState step_;
    ggml_context_ptr context_;
    ggml_backend_buffer_ptr buffer_;
    ggml_tensor* logits_ = nullptr;   // F32 [n_vocab, canvas_length]
    ggml_tensor* soft_ = nullptr;     // F32 [n_embd, canvas_length], the soft embedding; on a device
    std::vector<float> host_logits_;  // copies; on a device
};

class Denoiser {
  public:
    explicit Denoiser(const Model& model) : model_(model) {}

    struct Slot {
        CanvasState* state;  // its step() holds what goes in, and afterwards the measures
        KvCache* cache;
        const std::vector<int32_t>* canvas;  // at the positions behind the cache, canvas_length at most
        const std::atomic<bool>* cancel;     // whether anybody still waits for what comes out
        // Positions behind the canvas that are seen as the last step left them, and no longer denoised.
        int64_t n_frozen = 0;

        int64_t n_tokens() const { return static_cast<int64_t>(canvas->size()); }
    };

    // Runs one step on every slot's canvas, all in one graph. The graph stays for the next step on the same
    // slots in the same order. Throws Error(cancelled) soon after all of the slots are cancelled.
    void step(const std::vector<Slot>& slots, GraphExecutor& executor);

    // Runs the step just done once more, part by part, and tells what each took, on a GPU by its own clock.
    // The logits are spoiled by it. With by_operation the parts are the names of ops(), so that a device
    // fuses no operation with one of another name. For models that lie in one place.
    struct PartCost {
        double seconds = 0.0;
        double operations = 0.0;  // multiplications and additions of matrix products and attention
        double bytes = 0.0;       // of weights, keys and values read
    };
    std::map<std::string, PartCost> profile(GraphExecutor& executor, const std::atomic<bool>& cancel,
                                            bool by_operation);

    // To be called when the executor served another graph: the next step builds anew.
    void invalidate() { built_for_.clear(); }

    // Adds the activations of every step from now on, until called with null.
    void observe(ImatrixCollector* imatrix) {
        imatrix_ = imatrix;
        invalidate();
    }

    // Nodes of the graph last built, counted by ggml's names of their operations, our own by theirs; empty
    // before the first step.
    std::map<std::string, int> ops() const;

  private:
    void build(const std::vector<Slot>& slots, GraphExecutor& executor);
    ggml_tensor* soft_embedding_of(GraphBuilder& g, CanvasState& state, int64_t n_tokens);
    ggml_tensor* embed_slots(GraphBuilder& g, const std::vector<Slot>& slots);
    void finish_slot(GraphBuilder& g, CanvasState& state, ggml_tensor* x);

    const Model& model_;
    ImatrixCollector* imatrix_ = nullptr;
    std::unique_ptr<GraphBuilder> built_;
    // The slots' cache versions, canvas lengths and frozen positions.
    std::vector<std::tuple<uint64_t, int64_t, int64_t>> built_for_;
    std::vector<std::pair<CanvasState*, int64_t>> canvases_;  // of the graph, with their lengths
    ggml_tensor* canvas_ = nullptr;
};

}  // namespace pydiffusion
