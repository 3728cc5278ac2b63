// Graph builder: sequences and inputs of a graph, attention over their caches.
#pragma once

#include <deque>
#include <memory>

#include "adapters/adapter.h"
#include "backend/graph_executor.h"
#include "backend/graph_inputs.h"
#include "backend/graph_memory.h"
#include "backend/ops/ops.h"
#include "graph/layer_trace.h"
#include "kv_cache/kv_cache.h"
#include "model/model.h"

namespace pydiffusion {

// Causal attention over a prompt, or bidirectional over canvases.
enum class Mode { encoder, decoder };

// Tokens of one sequence in a graph, and the cache that they attend to.
struct Sequence {
    const KvCache* cache;
    int64_t n_tokens;
    int64_t n_frozen = 0;  // rows after the tokens that are visible but keep what an earlier graph wrote
    std::vector<ImageRange> images{};       // among the tokens of a prompt
    const AdapterList* adapters = nullptr;  // or null; read when the graph begins only
};

struct GraphBuilder {
    // Every tensor concatenates the sequences' tokens; a token attends only to its own sequence's cache.
    // memory: for the graph's tensors, if one graph follows another: ggml recognizes a CUDA graph by the
    // address of its first node, and updates it, which is faster than instantiating a new one. The graph that
    // used it before must be gone.
    GraphBuilder(const Model& model, Mode mode, std::vector<Sequence> sequences,
                 GraphMemory* memory = nullptr);

    const Model& model;
    const Mode mode;
    const std::vector<Sequence> sequences;
    ggml_context_ptr context;
    ggml_cgraph* graph;
    std::unique_ptr<GraphInputs> inputs;
    std::unique_ptr<Ops> ops;
    LayerTrace* trace = nullptr;  // of this graph, if any

    ggml_context* ctx() const { return context.get(); }
    int64_t n_tokens() const;  // of all sequences
    size_t n_images() const;
    int32_t head_dim(int32_t i_layer) const { return model.hparams.layers[i_layer].head_dim; }
    // Whether the layer's experts are on its own device.
    bool has_experts_with_layer(int32_t i_layer) const {
        return model.device_plan.experts_device(i_layer) == model.device_plan.layer_device(i_layer);
    }

    // Inputs of the first layer, on the device that embeds: ids of tokens, I32 [n]; features of images' soft
    // tokens, F32 [d, n].
    ggml_tensor* new_tokens(int64_t n) {
        return inputs->add(model.backend.n_devices() - 1, GGML_TYPE_I32, n);
    }
    ggml_tensor* new_features(int64_t n) {
        return inputs->add(model.backend.n_devices() - 1, GGML_TYPE_F32, model.hparams.n_embd, n);
    }
    ggml_tensor* embed(ggml_tensor* tokens) const;  // their embedding rows, scaled -> [d, n_tokens]

    // The output head of the last layer's output x, before the soft cap: [d, n] -> F32 [n_vocab, n], in the
    // memory of `target`, an allocated tensor, unless that is null.
    ggml_tensor* logits(ggml_tensor* x, const ggml_tensor* target = nullptr) const;

    // Q, K and V before norm and RoPE -> [head_dim * n_head, n_tokens]: writes K and V to the rows after each
    // sequence's cache, then attends over the visible rows. scale: of Q; output: reads the result.
    ggml_tensor* attention(int32_t i_layer, const Heads& heads, const HeadNorms& norms,
                           const WeightMatrix& output, float scale = 1.0f);
    // Only writes K and V.
    void store(int32_t i_layer, const Heads& heads, const HeadNorms& norms);

    // Shows a value of a layer, F32 [width, n_tokens], to the trace.
    void keep(const char* name, int32_t i_layer, ggml_tensor* x) const {
        if (!trace) return;
        trace->keep(name, i_layer, x);
        ggml_build_forward_expand(graph, x);  // a view that no node reads would get no memory
    }

    // Allocates the graph and fills the masks. `what` names the graph in an out-of-memory error.
    void allocate(GraphExecutor& executor, const char* what) const;
    // Sets the tokens' positions; only after allocate().
    void set_positions(const std::vector<int32_t>& positions);

    // Assigns tensors created from here on to a part of the step, for profiling. `name` must be a literal.
    void begin_part(const char* name) { parts.push_back({name, ggml_used_mem(ctx())}); }
    const char* part_of(const ggml_tensor* tensor) const;

    struct Part {
        const char* name;
        size_t begin;  // offset in the context's memory, where tensors are in order of creation
    };
    std::vector<Part> parts;

  private:
    LowRankTable collect_changes() const;
    struct LayerMask {
        size_t i_sequence;
        bool sliding;
        Causal causal;
    };
    Rope rope(int32_t i_layer) const;
    // Null for canvases.
    const Causal* causal(size_t i_sequence, int32_t i_layer);
    ggml_tensor* attend(size_t i_sequence, int32_t i_layer, ggml_tensor* q, ForMatmuls for_matmuls);

    LowRankTable changes_;                    // by the sequences' adapters
    std::deque<LayerMask> causal_;            // nodes point to them
    std::vector<int32_t> written_positions_;  // argument of the last set_positions()
};

}  // namespace pydiffusion
