#include "runtime/batch.h"

#include <chrono>
#include <new>

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

Batch::Batch(std::shared_ptr<const Model> model)
    : model_(std::move(model)), denoiser_(*model_), executor_(model_->backend) {}

std::vector<Batch::Outcome> Batch::next_steps(const std::vector<Session*>& sessions,
                                              const std::function<void(int32_t)>& on_chunk) {
    require_distinct(sessions, *model_);
    std::vector<Outcome> outcomes(sessions.size());
    std::vector<std::unique_ptr<Session::Use>> locks(sessions.size());
    std::vector<size_t> running;
    std::vector<Denoiser::Slot> slots;
    const auto attempt = [&](size_t i, const auto& action) {
        try {
            action();
        } catch (const Error&) {
            outcomes[i].error = std::current_exception();
            if (locks[i]) sessions[i]->abandon();
        }
    };
    for (size_t i = 0; i < sessions.size(); ++i) {
        attempt(i, [&] {
            locks[i] = std::make_unique<Session::Use>(*sessions[i]);
            if (!sessions[i]->begin_step(on_chunk)) return;
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
    for (size_t i_slot = 0; i_slot < slots.size(); ++i_slot) {
        const size_t i = running[i_slot];
        attempt(i, [&] {
            if (errors[i_slot]) std::rethrow_exception(errors[i_slot]);
            sessions[i]->end_step(seconds, outcomes[i].result);
        });
    }
    return outcomes;
}

// Denoises slots [begin, end) in one graph; if that runs out of memory, in two halves.
void Batch::denoise(const std::vector<Denoiser::Slot>& slots, size_t begin, size_t end,
                    std::vector<std::exception_ptr>& errors) {
    const auto fail = [&] {
        std::fill(errors.begin() + begin, errors.begin() + end, std::current_exception());
    };
    try {
        denoiser_.step({slots.begin() + begin, slots.begin() + end}, executor_);
        n_graphs_ += 1;
        return;
    } catch (const Error& error) {
        denoiser_.invalidate();
        if (error.kind() != ErrorKind::out_of_memory || end - begin < 2) return fail();
    } catch (const std::bad_alloc&) {
        denoiser_.invalidate();
        if (end - begin < 2) return fail();
    }
    const size_t middle = begin + (end - begin) / 2;
    denoise(slots, begin, middle, errors);
    denoise(slots, middle, end, errors);
}

}  // namespace pydiffusion
