// The denoising loop's body: one step of the generations of one or several sessions of a model, in one graph.
#pragma once

#include <exception>
#include <functional>
#include <optional>
#include <vector>

#include "runtime/session.h"

namespace pydiffusion {

// One session's part of a step: a result (result.step > 0), an error, or neither if its generation had ended.
struct StepOutcome {
    StepResult result{};
    std::exception_ptr error;
};

struct BatchStep {
    std::vector<StepOutcome> outcomes;  // one per session
    int n_graphs = 0;                   // more than 1 if memory for one graph ran out
};

// Runs one step of each session's generation, with the results that each would have alone. `denoiser` and
// `executor` keep the graph for the next step of the same sessions. on_chunk: see Session::encode.
// An error of one session ends its generation and is its outcome; the others continue. A session cancelled
// during the step may still get a result; the step aborts once all are cancelled.
BatchStep step(const std::vector<Session*>& sessions, Denoiser& denoiser, GraphExecutor& executor,
               const std::function<void(int32_t)>& on_chunk);

// A batch of one, in the session's own graph. Nothing after the generation's end; throws the session's error.
std::optional<StepResult> next_step(Session& session, const std::function<void(int32_t)>& on_chunk);

}  // namespace pydiffusion
