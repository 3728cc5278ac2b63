// Batch: denoises the canvases of several sessions of one model in one graph. Weights are read once for all
// of them, and each expert gets more rows per matmul.
#pragma once

#include <memory>
#include <vector>

#include "runtime/step.h"

namespace pydiffusion {

class Batch {
  public:
    explicit Batch(std::shared_ptr<const Model> model)
        : model_(std::move(model)), denoiser_(*model_), executor_(model_->backend) {}

    // See step(). Throws Error(argument) for a session of another model, or one that is in the batch twice.
    std::vector<StepOutcome> next_steps(const std::vector<Session*>& sessions,
                                        const std::function<void(int32_t)>& on_chunk);

    // Of the last step; see BatchStep.
    int n_graphs() const { return n_graphs_; }

  private:
    std::shared_ptr<const Model> model_;
    Denoiser denoiser_;
    GraphExecutor executor_;
    int n_graphs_ = 0;
};

}  // namespace pydiffusion
