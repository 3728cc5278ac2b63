// A graph under construction: its sequences, inputs and masks, and the operations that layers are made of.
#pragma once

#include <optional>

#include "backend/cpu/attention.h"
#include "backend/cpu/matmul.h"
#include "backend/ggml/ggml_ops.h"
#include "backend/graph_executor.h"
#include "graph/kv_cache.h"
#include "model/model.h"

namespace pydiffusion {

// Tokens of one sequence in a graph, and the cache that they follow.
struct Sequence {
    const KvCache* cache;
    int64_t n_tokens;
    int64_t n_frozen = 0;  // rows behind the tokens that stay as an earlier graph wrote them, and are seen
};

// A graph under construction and what its layers have in common.
struct GraphBuilder {
    // The sequences' tokens lie side by side in every tensor; each attends to its own cache only.
    GraphBuilder(const Model& model, std::vector<Sequence> sequences);

    const Model& model;
    std::vector<Sequence> sequences;
    ggml_context_ptr context;
    ggml_cgraph* graph;
    std::optional<gemm::Matmul> matmul;  // how this graph multiplies with weights

    ggml_context* ctx() const { return context.get(); }
    int64_t n_tokens() const;  // of all sequences

    // A tensor that is written before each run of the graph and keeps what was written. Portable graphs have
    // them in memory of the device that reads them, laid out with the graph; else in that of the last device.
    ggml_tensor* new_input(ggml_type type, int64_t n0, int64_t n1 = 1);
    ggml_tensor* new_input_on(int32_t device, ggml_type type, int64_t n0, int64_t n1);
    // Where the tokens stand, to be called once the graph has its memory.
    void set_positions(const std::vector<int32_t>& positions);
    // Has the tensor computed where the weight lies, were it next to others' work; of all nodes from the i-th
    // on.
    void pin_to_device_of(const ggml_tensor* weight, ggml_tensor* tensor);
    void pin_to_device_of(const ggml_tensor* weight, int first_node);
    // Gives the graph its memory and writes the masks.
    void allocate(GraphExecutor& executor, const char* what) const;

    // Tensors made from here on belong to this part of the step, for profiles. `name` must be a literal.
    void begin_part(const char* name) { parts.push_back({name, ggml_used_mem(ctx())}); }
    const char* part_of(const ggml_tensor* tensor) const;

    struct Part {
        const char* name;
        size_t begin;  // offset in the context's memory, in which tensors lie in the order of their making
    };
    std::vector<Part> parts;

    // Which rows a sequence's tokens may see of a layer; layers of one device that see the same share one.
    // Portable graphs only.
    ggml_ops::Mask mask(size_t i_sequence, int32_t i_layer, int64_t n_visible, const Causal* causal);

    bool uses_ggml_ops() const { return model.backend.on_device(); }

    ggml_tensor* rms_norm(ggml_tensor* x, ggml_tensor* weight = nullptr) const;  // weight null: none
    ggml_tensor* gelu_product(ggml_tensor* gate, ggml_tensor* up) const;         // gelu(gate) * up
    ggml_tensor* stack(const std::vector<ggml_tensor*>& parts) const;            // [d, n_i] side by side
    // x + rms_norm(branch, weight)
    ggml_tensor* add_normed(ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight) const;
    // rms_norm(x, weight) turned by its tokens' positions, x [head_dim, n_heads, n] with tokens from `first`
    // on
    ggml_tensor* rotate_normed(ggml_tensor* x, ggml_tensor* weight, int32_t i_layer, int64_t first = 0);
    ggml_tensor* mlp(ggml_tensor* x, ggml_tensor* gate, ggml_tensor* up, ggml_tensor* down);
    ggml_tensor* embed(ggml_tensor* ids) const;  // rows of the embedding times sqrt(d) -> [d, n_tokens]

  private:
    struct MaskKey {
        size_t i_sequence;
        int32_t device;
        bool sliding;
        ggml_ops::Mask mask;
    };
    // Cosines and sines of the tokens' angles, of layers that rotate alike; see rotate_normed of row_ops.h.
    struct Angles {
        bool sliding;
        ggml_tensor* tensor;
    };
    ggml_tensor* angles(int64_t head_dim, bool sliding);

    // I32 [n_tokens], of portable graphs: the processor's, then each device's; null where nothing is rotated.
    std::vector<ggml_tensor*> positions_;
    std::vector<Angles> angles_;    // of the others
    std::vector<int32_t> written_;  // the positions whose angles are there
    std::vector<MaskKey> masks_;
    GraphExecutor::Pinned pinned_;
    std::vector<ggml_context_ptr> input_contexts_;  // of portable graphs: the processor's, then each device's
};

}  // namespace pydiffusion
