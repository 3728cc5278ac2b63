// Matmuls of weights with activations as nodes: of our CPU kernels, or ggml's.
#pragma once

#include <deque>
#include <map>

#include "backend/cpu/amx/tile_gemm.h"
#include "backend/cpu/low_rank.h"
#include "backend/cpu/packed_activations.h"
#include "ggml.h"

namespace pydiffusion {
namespace gemm {

// Operands of a matmul node, ggml's or ours; weight is null if the node is not a matmul.
struct MatmulOperands {
    const ggml_tensor* weight = nullptr;
    const ggml_tensor* x = nullptr;  // F32 [n_inner, n_activations], or [n_inner, 1 or n_used, n_tokens]
    const ggml_tensor* experts = nullptr;  // I32 [n_used, n_tokens]; null: not an expert matmul
};
MatmulOperands matmul_operands(const ggml_tensor* node);

// ggml's matmul, with float32 sums: weight [n_inner, n_rows] times x [n_inner, n_activations].
ggml_tensor* ggml_matmul(ggml_context* ctx, ggml_tensor* weight, ggml_tensor* x);
// weight [n_inner, n_rows, n_expert], x [n_inner, 1 or n_used, n_tokens], experts I32 [n_used, n_tokens]
ggml_tensor* ggml_matmul(ggml_context* ctx, ggml_tensor* weight, ggml_tensor* x, ggml_tensor* experts);

// Builds a graph's matmuls with the given kernel if it supports the weight's type, else with ggml's.
// Activations that several weights multiply are packed once, and computed while they are packed if their node
// allows it. Must live as long as the graph. Each element of a result depends on its own row and activation
// only, not on the size of the batch.
class Matmul {
  public:
    Matmul(ggml_context* ctx, Kernel kernel) : ctx_(ctx), kernel_(kernel) {}
    Matmul(const Matmul&) = delete;
    Matmul& operator=(const Matmul&) = delete;

    // weight [n_inner, n_rows] times x [n_inner, n_activations] -> F32 [n_rows, n_activations]
    ggml_tensor* apply(ggml_tensor* weight, ggml_tensor* x);
    // The same without padding to kMinActivations: the result is a node instead of a view, so that a buffer
    // can be assigned to it.
    ggml_tensor* apply_unpadded(ggml_tensor* weight, ggml_tensor* x);
    // weight [n_inner, n_rows, n_expert], x [n_inner, 1 or n_used, n_tokens], experts I32 [n_used, n_tokens]
    // -> F32 [n_rows, n_used, n_tokens]
    ggml_tensor* apply(ggml_tensor* weight, ggml_tensor* x, ggml_tensor* experts);

    // As pydiffusion::add_low_rank does, by our kernels, for factors that they support.
    ggml_tensor* add_low_rank(const LowRank& change, ggml_tensor* x, ggml_tensor* result);

    // Whether activations of this weight are rounded to bfloat16: those of our kernels.
    bool rounds(const ggml_tensor* weight) const;

    // From now on activations stay nodes of the graph, so that they can be read (imatrix collection).
    void keep_activations() { keep_activations_ = true; }

  private:
    bool supports(const ggml_tensor* weight, const ggml_tensor* x) const;
    bool use_tiles(const ggml_tensor* weight, const ggml_tensor* x) const;
    ggml_tensor* grouped(ggml_tensor* experts, int64_t n_expert);
    ggml_tensor* packed(ggml_tensor* x, ggml_tensor* experts, int64_t n_expert);

    ggml_context* ctx_;
    Kernel kernel_;
    bool keep_activations_ = false;
    std::map<const ggml_tensor*, ggml_tensor*> groups_;  // experts -> their groups
    std::map<const ggml_tensor*, ggml_tensor*> packed_;  // x -> its packed node
    std::deque<Packing> packings_;                       // a deque: nodes point to them
};

}  // namespace gemm
}  // namespace pydiffusion
