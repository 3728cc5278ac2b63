// RopeAngles: cosines and sines of a graph's RoPE angles, an input shared by all layers of a kind on a
// device. AxialInputs: the positions themselves as inputs.
#pragma once

#include <vector>

#include "backend/graph_inputs.h"

namespace pydiffusion {

// Rotary position embedding of a kind of layers.
struct Rope {
    int32_t device;  // that computes the layers, or kCpuDevice
    float base;
    int32_t n_ctx_train;
    ggml_tensor* factors = nullptr;  // F32 [head_dim / 2], divisors of the frequencies, on that device
    const std::vector<float>* host_factors = nullptr;  // the same on the host
};

// Where a token is in a picture: column and row, of which each rotates half of a head.
struct AxialPosition {
    int32_t x, y;
};

// Positions of a graph's tokens as inputs of it, I32 [n_tokens] of each axis; null until they are added.
struct AxialInputs {
    ggml_tensor *x = nullptr, *y = nullptr;

    void add(GraphInputs& inputs, int32_t device, int64_t n_tokens);
    // After the graph is allocated; of every token, unless there are no inputs.
    void write(const std::vector<AxialPosition>& positions) const;
};

class RopeAngles {
  public:
    RopeAngles(ggml_context* ctx, GraphInputs& inputs, int64_t n_tokens)
        : ctx_(ctx), inputs_(inputs), n_tokens_(n_tokens) {}

    // F32 [head_dim, n], those of the graph's tokens from `first` on; see rotate_normed in fused_rows.h.
    ggml_tensor* view(const Rope& rope, int64_t head_dim, int64_t first, int64_t n);
    // Computes them; after the graph is allocated.
    void write(const std::vector<int32_t>& positions) const;
    // The same of all tokens for rotate_axes in fused_rows.h.
    ggml_tensor* axial(const Rope& rope, int64_t head_dim) { return view(rope, head_dim, 0, n_tokens_); }
    void write(const std::vector<AxialPosition>& positions) const;

  private:
    struct Table {
        Rope rope;
        ggml_tensor* tensor;  // [head_dim, n_tokens]
    };

    ggml_context* ctx_;
    GraphInputs& inputs_;
    int64_t n_tokens_;
    std::vector<Table> tables_;
};

}  // namespace pydiffusion
