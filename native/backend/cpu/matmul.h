// Matmul of weights and activations as nodes of a graph on the processor.
#pragma once

#include <deque>
#include <map>

#include "backend/cpu/amx/tile_gemm.h"
#include "backend/cpu/fused_rows.h"
#include "ggml.h"

namespace pydiffusion {
namespace gemm {

// What any node that multiplies with weights is made of, ggml's or ours; weight null: it is no product.
struct MatmulOperands {
    const ggml_tensor* weight = nullptr;
    const ggml_tensor* x = nullptr;  // F32 [n_inner, n_activations], or [n_inner, 1 or n_used, n_tokens]
    const ggml_tensor* experts = nullptr;  // I32 [n_used, n_tokens]; null: not by expert
};
MatmulOperands matmul_operands(const ggml_tensor* node);

// What a node of packed activations is made of.
struct Packing {
    const ggml_tensor* x;
    MakeRow make;  // of x, which has no memory then; null: x is a node of the graph
    const ggml_tensor* experts;
    int64_t n_expert;
};

// Makes a graph's products with the kernel given, where it has the weight's type, else with ggml's. Columns
// that meet several weights are packed once, and where that can be they are made while they are packed. Has
// to live as long as the graph. Each number of a product depends on its own row and activation only, not on
// how many there are beside them.
class Matmul {
  public:
    // on_device: of a graph that a GPU computes; there ggml's products are taken as they come.
    Matmul(ggml_context* ctx, Kernel kernel, bool on_device)
        : ctx_(ctx), kernel_(kernel), on_device_(on_device) {}
    Matmul(const Matmul&) = delete;
    Matmul& operator=(const Matmul&) = delete;

    // weight [n_inner, n_rows] times x [n_inner, n_activations] -> F32 [n_rows, n_activations]
    ggml_tensor* apply(ggml_tensor* weight, ggml_tensor* x);
    // The same without padding to kMinActivations: the result is a node and no view, so that a buffer can be
    // assigned to it.
    ggml_tensor* apply_unpadded(ggml_tensor* weight, ggml_tensor* x);
    // weight [n_inner, n_rows, n_expert], x [n_inner, 1 or n_used, n_tokens], experts I32 [n_used, n_tokens]
    // -> F32 [n_rows, n_used, n_tokens]
    ggml_tensor* apply(ggml_tensor* weight, ggml_tensor* x, ggml_tensor* experts);

    // Columns are nodes of the graph from now on, for who wants to read them.
    void keep_activations() { keep_activations_ = true; }

  private:
    bool takes(const ggml_tensor* weight, const ggml_tensor* x) const;
    bool by_tiles(const ggml_tensor* weight, const ggml_tensor* x) const;
    ggml_tensor* packed(ggml_tensor* x, ggml_tensor* experts, int64_t n_expert);

    ggml_context* ctx_;
    Kernel kernel_;
    bool on_device_;
    bool keep_activations_ = false;
    std::map<const ggml_tensor*, ggml_tensor*> packed_;  // by what was packed
    std::deque<Packing> packings_;                       // where they stay
};

}  // namespace gemm
}  // namespace pydiffusion
