// Batched denoising: the canvases of several sessions of one model in one graph. Weights are read once for
// all of them, and each expert gets more rows per matmul.
#pragma once

#include <exception>
#include <memory>
#include <vector>

#include "backend/graph_executor.h"
#include "runtime/session.h"

namespace pydiffusion {

class Batch {
  public:
    explicit Batch(std::shared_ptr<const Model> model);

    // A step's outcome for one session: a result (result.step > 0), an error, or neither if its generation
    // had ended before.
    struct Outcome {
        StepResult result{};
        std::exception_ptr error;
    };

    // Runs one step of each session's generation, with the results that each would have alone. An error of
    // one session ends its generation and is returned in its outcome; the others continue. A session
    // cancelled during the step may still get a result; the step aborts once all are cancelled. Splits the
    // batch if memory for one graph runs out.
    std::vector<Outcome> next_steps(const std::vector<Session*>& sessions,
                                    const std::function<void(int32_t)>& on_chunk);

    // Number of graphs used by the last step; more than 1 if it ran out of memory for one.
    int n_graphs() const { return n_graphs_; }

    const Model& model() const { return *model_; }

  private:
    void denoise(const std::vector<Denoiser::Slot>& slots, size_t begin, size_t end,
                 std::vector<std::exception_ptr>& errors);

    std::shared_ptr<const Model> model_;
    Denoiser denoiser_;
    GraphExecutor executor_;
    int n_graphs_ = 0;
};

}  // namespace pydiffusion
