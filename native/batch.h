// Several sessions of one model denoised in one graph: the weights are read once for all of them, and
// experts get more rows at a time.
#pragma once

#include <exception>
#include <memory>
#include <vector>

#include "session.h"

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
    // on has the error in its outcome, its generation is over, and the others go on. Throws, and ends all
    // generations, when the graph that they share can't be computed.
    std::vector<Outcome> next_steps(const std::vector<Session*>& sessions,
                                    const std::function<void(int32_t)>& between);

    // From any thread: the step under way, or the next one, throws Error(cancelled).
    void cancel() { cancel_ = true; }

    const Model& model() const { return *model_; }

  private:
    std::shared_ptr<const Model> model_;
    Denoiser denoiser_;
    Workspace workspace_;
    std::atomic<bool> cancel_{false};
};

}  // namespace pydiffusion
