// Graph builder: sequences, inputs and masks of a graph, and the operations that layers are built from.
#pragma once

#include <cstdlib>
#include <memory>
#include <optional>

#include "backend/cpu/attention.h"
#include "backend/cpu/matmul.h"
#include "backend/expert_nodes.h"
#include "backend/ggml/ggml_ops.h"
#include "backend/graph_executor.h"
#include "kv_cache/kv_cache.h"
#include "model/model.h"

namespace pydiffusion {

// Tokens of one sequence in a graph, and the cache that they attend to.
struct Sequence {
    const KvCache* cache;
    int64_t n_tokens;
    int64_t n_frozen = 0;  // rows after the tokens that are visible but keep what an earlier graph wrote
};

// Memory for the tensors of one graph after another, which stays at its address for graphs of the same size.
class GraphMemory {
  public:
    void* reserve(size_t n_bytes);  // null if there is not enough

  private:
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> memory_;
    size_t n_bytes_ = 0;
};

struct GraphBuilder {
    // Every tensor concatenates the sequences' tokens; a token attends only to its own sequence's cache.
    // memory: for the graph's tensors, if one graph follows another: ggml recognizes a CUDA graph by the
    // address of its first node, and updates it, which is faster than instantiating a new one. The graph that
    // used it before must be gone.
    GraphBuilder(const Model& model, std::vector<Sequence> sequences, GraphMemory* memory = nullptr);

    const Model& model;
    std::vector<Sequence> sequences;
    ggml_context_ptr context;
    ggml_cgraph* graph;
    std::optional<gemm::Matmul> matmul;           // builds matmuls with weights
    std::optional<ExpertMatmuls> expert_matmuls;  // on devices

    ggml_context* ctx() const { return context.get(); }
    int64_t n_tokens() const;  // of all sequences

    // An input tensor: written before a run of the graph, kept until the next write. Graphs of ggml ops have
    // inputs in device memory: new_input() in the last device's, new_input_on() in any (or the CPU's).
    ggml_tensor* new_input(ggml_type type, int64_t n0, int64_t n1 = 1);
    ggml_tensor* new_input_on(int32_t device, ggml_type type, int64_t n0, int64_t n1);
    // Sets the tokens' positions; only after allocate().
    void set_positions(const std::vector<int32_t>& positions);
    // Pins the tensor, or all nodes from first_node on, to the weight's device, whatever the scheduler would
    // choose.
    void pin_to_device_of(const ggml_tensor* weight, ggml_tensor* tensor);
    void pin_to_device_of(const ggml_tensor* weight, int first_node);
    // Allocates the graph and fills the masks. `what` names the graph in an out-of-memory error.
    void allocate(GraphExecutor& executor, const char* what) const;

    // Assigns tensors created from here on to a part of the step, for profiling. `name` must be a literal.
    void begin_part(const char* name) { parts.push_back({name, ggml_used_mem(ctx())}); }
    const char* part_of(const ggml_tensor* tensor) const;

    struct Part {
        const char* name;
        size_t begin;  // offset in the context's memory, where tensors are in order of creation
    };
    std::vector<Part> parts;

    // Graphs of ggml ops: attention mask of a sequence in a layer, shared by a device's layers of a kind.
    ggml_ops::Mask mask(size_t i_sequence, int32_t i_layer, int64_t n_visible, const Causal* causal);

    bool uses_ggml_ops() const { return model.backend.on_device(); }
    bool fuses_rows() const { return model.backend.fuses_rows(); }
    static bool is_on_device(const ggml_tensor* weight) {
        return !ggml_backend_buffer_is_host(weight->buffer);
    }

    // type: F32, or what Matmul::activation_type() wants.
    ggml_tensor* rms_norm(ggml_tensor* x, ggml_tensor* weight = nullptr,
                          ggml_type type = GGML_TYPE_F32) const;
    // gelu(gate) * up
    ggml_tensor* gated_gelu(ggml_tensor* gate, ggml_tensor* up, ggml_type type = GGML_TYPE_F32) const;
    ggml_tensor* concat_tokens(const std::vector<ggml_tensor*>& parts) const;  // [d, n_i] -> [d, sum of n_i]
    // x + rms_norm(branch, weight)
    ggml_tensor* add_normed(ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight) const;
    // RoPE of rms_norm(x, weight); x [head_dim, n_heads, n] holds the graph's tokens from `first` on
    ggml_tensor* norm_and_rope(ggml_tensor* x, ggml_tensor* weight, int32_t i_layer, int64_t first = 0);
    // Expert matmul, as gemm::Matmul::apply.
    ggml_tensor* multiply_experts(ggml_tensor* weights, ggml_tensor* x, ggml_tensor* experts);
    // Writes rms_norm(x), with a weight norm_and_rope(x, weight), to rows of a cache from `row` on.
    void store_normed(ggml_tensor* x, ggml_tensor* weight, int32_t i_layer, int64_t first, ggml_tensor* cache,
                      int64_t row);
    // Both for Q, K and V of a sequence at once; returns Q. K and V go to the rows that the range says.
    ggml_tensor* rotate_and_store(ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, int32_t i_layer,
                                  int64_t first, const KvRange& range);
    // MLP of rms_norm(x, norm); gate_up is null, or gate and up concatenated. beside_experts: as
    // mlp_beside() if the device can.
    ggml_tensor* mlp(ggml_tensor* x, ggml_tensor* norm, ggml_tensor* gate, ggml_tensor* up,
                     ggml_tensor* gate_up, ggml_tensor* down, bool beside_experts = false);
    ggml_tensor* embed(ggml_tensor* ids) const;  // embedding rows times sqrt(d) -> [d, n_tokens]

  private:
    struct MaskKey {
        size_t i_sequence;
        int32_t device;
        bool sliding;
        ggml_ops::Mask mask;
    };
    // Cosines and sines of the tokens' RoPE angles, shared by a device's layers of the same kind; see
    // rotate_normed in fused_rows.h.
    struct Angles {
        bool sliding;
        int32_t device;
        ggml_tensor* tensor;
    };
    // Those of n tokens of the graph from `first` on.
    ggml_tensor* angles(int64_t head_dim, int32_t i_layer, int64_t first, int64_t n);
    // View of n rows of a cache as heads.
    ggml_tensor* cache_heads(ggml_tensor* cache, int64_t head_dim, int64_t first, int64_t n) const;

    // Graphs of ggml ops: I32 [n_tokens] for the CPU, then each device; null until a layer needs it.
    std::vector<ggml_tensor*> positions_;
    std::vector<Angles> angles_;              // graphs with fused rows
    std::vector<int32_t> written_positions_;  // argument of the last set_positions()
    std::vector<MaskKey> masks_;
    GraphExecutor::Pinned pinned_;
    std::vector<ggml_context_ptr> input_contexts_;  // graphs of ggml ops: the CPU's, then each device's
};

}  // namespace pydiffusion
