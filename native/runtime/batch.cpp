#include "runtime/batch.h"

#include <chrono>

#include "util/error.h"

namespace pydiffusion {

namespace {

void require_distinct(const std::vector<Session*>& sessions, const Model& model) {
    for (size_t i = 0; i < sessions.size(); ++i) {
        if (&sessions[i]->model() != &model) {
            throw Error(ErrorKind::argument, format("session %zu belongs to another model", i));
        }
        if (std::find(sessions.begin(), sessions.begin() + i, sessions[i]) != sessions.begin() + i) {
            throw Error(ErrorKind::argument, format("session %zu is in the batch twice", i));
        }
    }
}

}  // namespace

Batch::Batch(std::shared_ptr<const Model> model)
    : model_(std::move(model)), denoiser_(*model_), executor_(model_->backend) {}

std::vector<Batch::Outcome> Batch::next_steps(const std::vector<Session*>& sessions,
                                              const std::function<void(int32_t)>& between) {
    require_distinct(sessions, *model_);
    std::vector<Outcome> outcomes(sessions.size());
    std::vector<std::unique_ptr<Session::Use>> uses(sessions.size());
    std::vector<size_t> running;
    std::vector<Denoiser::Slot> slots;
    const auto attempt = [&](size_t i, const auto& action) {
        try {
            action();
        } catch (const Error&) {
            outcomes[i].error = std::current_exception();
            if (uses[i]) sessions[i]->abandon();
        }
    };
    for (size_t i = 0; i < sessions.size(); ++i) {
        attempt(i, [&] {
            uses[i] = std::make_unique<Session::Use>(*sessions[i]);
            if (!sessions[i]->begin_step(between)) return;
            running.push_back(i);
            slots.push_back(sessions[i]->slot());
        });
    }
    if (slots.empty()) return outcomes;
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::exception_ptr> errors(slots.size());
    n_graphs_ = 0;
    denoise(slots, 0, slots.size(), errors);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    for (size_t i_lane = 0; i_lane < slots.size(); ++i_lane) {
        const size_t i = running[i_lane];
        attempt(i, [&] {
            if (errors[i_lane]) std::rethrow_exception(errors[i_lane]);
            sessions[i]->end_step(seconds, outcomes[i].result);
        });
    }
    return outcomes;
}

// The slots from begin to end, in one graph if there is memory for it, else in two halves.
void Batch::denoise(const std::vector<Denoiser::Slot>& slots, size_t begin, size_t end,
                    std::vector<std::exception_ptr>& errors) {
    try {
        denoiser_.step({slots.begin() + begin, slots.begin() + end}, executor_);
        n_graphs_ += 1;
        return;
    } catch (const Error& error) {
        denoiser_.invalidate();
        if (error.kind() != ErrorKind::out_of_memory || end - begin < 2) {
            std::fill(errors.begin() + begin, errors.begin() + end, std::current_exception());
            return;
        }
    }
    const size_t middle = begin + (end - begin) / 2;
    denoise(slots, begin, middle, errors);
    denoise(slots, middle, end, errors);
}

}  // namespace pydiffusion
