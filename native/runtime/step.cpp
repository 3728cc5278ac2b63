#include "runtime/step.h"

#include <memory>
#include <new>

#include "util/error.h"
#include "util/timer.h"

namespace pydiffusion {

namespace {

// A session that takes part in the step. It is in use until the step ends.
struct Member {
    Session* session;
    StepOutcome* outcome;
    std::unique_ptr<Session::Use> use{};

    // Runs a part of the step for this session alone; returns what `part` does, false after an error.
    template <typename Part>
    bool attempt(const Part& part) {
        try {
            return part();
        } catch (const Error&) {
            fail();
        } catch (const std::bad_alloc&) {
            fail();
        }
        return false;
    }

    void fail() {  // within a catch block
        outcome->error = std::current_exception();
        if (use) session->abandon();
    }
};

using Members = std::vector<Member>;

// Denoises the canvases of members [begin, end) in one graph; if memory for it runs out, in two halves.
// Returns the number of graphs.
int denoise(const Members::iterator begin, const Members::iterator end, Denoiser& denoiser,
            GraphExecutor& executor) {
    const auto n = end - begin;
    const auto fail_all = [&] {
        for (auto member = begin; member != end; ++member) member->fail();
        return 0;
    };
    try {
        std::vector<Denoiser::Slot> slots;
        for (auto member = begin; member != end; ++member) slots.push_back(member->session->slot());
        denoiser.step(slots, executor);
        return 1;
    } catch (const Error& error) {
        denoiser.invalidate();
        if (error.kind() != ErrorKind::out_of_memory || n < 2) return fail_all();
    } catch (const std::bad_alloc&) {
        denoiser.invalidate();
        if (n < 2) return fail_all();
    }
    const int n_graphs = denoise(begin, begin + n / 2, denoiser, executor);
    return n_graphs + denoise(begin + n / 2, end, denoiser, executor);
}

}  // namespace

BatchStep step(const std::vector<Session*>& sessions, Denoiser& denoiser, GraphExecutor& executor,
               const std::function<void(int32_t)>& on_chunk) {
    BatchStep result;
    result.outcomes.resize(sessions.size());

    // Commit the canvas before, begin the next one, draw the step's random numbers.
    Members running;
    for (size_t i = 0; i < sessions.size(); ++i) {
        Member member{sessions[i], &result.outcomes[i]};
        const bool has_step = member.attempt([&] {
            member.use = std::make_unique<Session::Use>(*member.session);
            return member.session->begin_step(on_chunk);
        });
        if (has_step) running.push_back(std::move(member));
    }
    if (running.empty()) return result;

    double seconds = 0.0;
    {
        const AddSeconds timer(seconds);
        result.n_graphs = denoise(running.begin(), running.end(), denoiser, executor);
    }

    // Accept tokens, replace the others by noise, finish the canvas if it is done.
    for (Member& member : running) {
        if (member.outcome->error) continue;
        member.attempt([&] {
            member.session->end_step(seconds, member.outcome->result);
            return true;
        });
    }
    return result;
}

std::optional<StepResult> next_step(Session& session, const std::function<void(int32_t)>& on_chunk) {
    BatchStep batch = step({&session}, session.denoiser(), session.executor(), on_chunk);
    StepOutcome& outcome = batch.outcomes[0];
    if (outcome.error) std::rethrow_exception(outcome.error);
    if (outcome.result.step == 0) return std::nullopt;
    return std::move(outcome.result);
}

}  // namespace pydiffusion
