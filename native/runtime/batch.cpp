#include "runtime/batch.h"

#include <algorithm>

#include "util/error.h"

namespace pydiffusion {

namespace {

void require_distinct(const std::vector<Session*>& sessions, const Model& model) {
    for (size_t i = 0; i < sessions.size(); ++i) {
        if (&sessions[i]->model() != &model) {
            throw Error(ErrorKind::argument, format("session %zu of the batch belongs to another model", i));
        }
        if (std::find(sessions.begin(), sessions.begin() + i, sessions[i]) != sessions.begin() + i) {
            throw Error(ErrorKind::argument, format("session %zu of the batch is a duplicate", i));
        }
    }
}

}  // namespace

std::vector<StepOutcome> Batch::next_steps(const std::vector<Session*>& sessions,
                                           const std::function<void(int32_t)>& on_chunk) {
    require_distinct(sessions, *model_);
    BatchStep result = step(sessions, denoiser_, executor_, on_chunk);
    n_graphs_ = result.n_graphs;
    return std::move(result.outcomes);
}

}  // namespace pydiffusion
