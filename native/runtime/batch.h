// Several sessions of one model denoised in one graph: the weights are read once for all of them, and
// experts get more rows at a time.
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

    // What a step was for one session. At most one of `result.step > 0` and `error` is so; neither, when its
    // generation was over already.
    struct Outcome {
        StepResult result{};
        std::exception_ptr error;
    };

    // One step of each session's generation, the same as the sessions would do alone. A session that can't go
    // on has the error in its outcome, its generation is over, and the others go on. One that is cancelled
    // during the step may still have a result; the step is given up when all of them are. Where there is no
    // memory for all at once, they are denoised in parts.
    std::vector<Outcome> next_steps(const std::vector<Session*>& sessions,
                                    const std::function<void(int32_t)>& between);

    // Graphs that the last step took: more than one where memory did not permit that.
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
