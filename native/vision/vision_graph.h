// Graphs of a vision tower: embedding of patches, layers, projection.
#pragma once

#include <memory>
#include <vector>

#include "backend/graph_executor.h"
#include "backend/graph_inputs.h"
#include "backend/graph_memory.h"
#include "backend/ops/ops.h"
#include "model/model.h"
#include "vision/vision_hparams.h"
#include "vision/vision_weights.h"

namespace pydiffusion {

// One graph over all tokens of an image, on the backend of the text model. Values go in and out by way of
// the host.
class VisionGraph {
  public:
    VisionGraph(const Model& model, const VisionHparams& hparams, const VisionWeights& weights,
                int64_t n_tokens);

    // F32 [n0, n_tokens], an input.
    ggml_tensor* new_input(int64_t n0);
    // Patches [patch_elements(), n_tokens] -> [d, n_tokens]
    ggml_tensor* embed(ggml_tensor* patches);
    ggml_tensor* layer(const VisionLayer& w, ggml_tensor* x);
    // Pooled and normed features -> [projection_dim, n_tokens]
    ggml_tensor* project(ggml_tensor* x) { return ops_->matmul(weights_.projection, x); }

    // Computes `result` from `values` of `input`; positions of the tokens, not used by project().
    std::vector<float> compute(GraphExecutor& executor, ggml_tensor* result, ggml_tensor* input,
                               const std::vector<float>& values, const std::vector<AxialPosition>& positions);

  private:
    ggml_context* ctx() const { return context_.get(); }
    ggml_tensor* limited(ggml_tensor* x, const Bounds& bounds);
    ggml_tensor* multiply(const ClippedMatrix& w, ggml_tensor* x);
    ggml_tensor* heads(const ClippedMatrix& w, ggml_tensor* x);

    const VisionHparams& hp_;
    const VisionWeights& weights_;
    const int64_t n_tokens_;
    const int32_t device_;
    ggml_context_ptr context_;
    ggml_cgraph* graph_;
    std::unique_ptr<GraphInputs> inputs_;
    std::unique_ptr<Ops> ops_;
    AxialInputs axes_;  // of embed()
    struct Limited {
        const ggml_tensor* x;
        Bounds bounds;
        ggml_tensor* result;
    };
    std::vector<Limited> limited_;  // of this graph: matrices with the same bounds share them
};

}  // namespace pydiffusion
