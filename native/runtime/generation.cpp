// A session's generation: begin a canvas, denoise it until the sampler says so (see step.h), finish it,
// commit it with the next one.
#include <algorithm>

#include "model/architecture.h"
#include "runtime/session.h"
#include "sampler/registry.h"
#include "util/error.h"
#include "util/timer.h"

namespace pydiffusion {

void Session::begin(const GenerationParams& params) {
    const Hparams& hp = model_->hparams;
    auto sampler = make_sampler(hp.architecture->sampler(), params.sampler, hp.n_vocab, hp.mask_token);
    check_params(params);
    check_hold(params);
    cache_.mark();  // the next turn may roll back to here, if the chat template drops the thinking
    generation_ = std::make_unique<Generation>();
    generation_->params = params;
    generation_->sampler = std::move(sampler);
}

// --- a step ---

bool Session::begin_step(const std::function<void(int32_t)>& on_chunk) {
    if (!generation_ || generation_->done) return false;
    Generation& g = *generation_;
    if (g.pending) throw Error(ErrorKind::argument, "a guided step is pending: call impose first");
    if (g.step == 0) begin_canvas(on_chunk);
    StepState& state = canvas_state_.step();
    state.self_conditioning = g.step < g.params.sampler.steps();
    state.dropped_mass = g.params.dropped_mass;
    g.sampler->begin_step(g.step, state);
    return true;
}

void Session::begin_canvas(const std::function<void(int32_t)>& on_chunk) {
    Generation& g = *generation_;
    if (!is_fresh()) {
        const AddSeconds timer(g.encode_seconds);
        refresh(on_chunk);
        cache_.mark();  // as begin() did
    }
    if (!g.finished.empty()) {
        const AddSeconds timer(g.encode_seconds);
        append({g.finished}, on_chunk);
        g.finished.clear();
    }
    const size_t n = canvas_length(g.params);
    g.step = g.params.sampler.steps();
    g.canvas.resize(n);
    g.settled.assign(n, -1);
    g.eos_at = n;
    g.n_same_eos = 0;
    g.frozen_entropy = 0.0;
    g.sampler->begin_canvas(g.canvas_index);
    for (size_t i = 0; i < n; ++i) {
        const int32_t given = given_token(i);
        g.canvas[i] = given >= 0 ? given : g.sampler->noise(i);
        if (g.sampler->keeps_tokens() || is_held(i)) g.settled[i] = given;
    }
}

void Session::end_step(double seconds, StepResult& result) {
    Generation& g = *generation_;
    g.denoise_seconds += seconds;
    canvas_state_.require_finite(g.canvas.size(), !effective(adapters_).empty());
    const std::vector<int32_t> chosen = measure(result);
    if (g.params.guided) {
        g.pending = std::make_unique<StepResult>(result);
    } else {
        apply_tokens(result, chosen);
    }
    report(result);
}

// Draft, entropies and accepted positions; returns the tokens that accepted positions get. A settled position
// has entropy 0. Where a position is held, or a guide is to choose, the logits are replaced by its settled
// token.
std::vector<int32_t> Session::measure(StepResult& result) {
    Generation& g = *generation_;
    result = StepResult();
    result.canvas_index = g.canvas_index;
    result.step = g.step;
    std::vector<int32_t> chosen;
    for (size_t i = 0; i < g.canvas.size(); ++i) {
        const int32_t token = g.settled[i];
        if (token >= 0 && (is_held(i) || g.params.guided)) canvas_state_.pin(i, token);
        const Measure m = token >= 0 ? Measure{token, token, 0.0f} : canvas_state_.step().measures[i];
        result.draft.push_back(m.argmax);
        result.entropy.push_back(m.entropy);
        chosen.push_back(g.sampler->choose(m));
    }
    result.accepted = g.sampler->accept(result.entropy, g.settled);
    return chosen;
}

// chosen: tokens for accepted positions; in a guided step, also the draft. The others get noise.
void Session::apply_tokens(StepResult& result, const std::vector<int32_t>& chosen) {
    Generation& g = *generation_;
    double total_entropy = g.frozen_entropy;
    for (size_t i = 0; i < g.canvas.size(); ++i) {
        total_entropy += result.entropy[i];
        if (g.settled[i] >= 0) continue;
        const bool accepted = result.accepted[i];
        if (g.params.guided) {
            if (accepted && chosen[i] != result.draft[i]) canvas_state_.pin(i, chosen[i]);
            result.draft[i] = chosen[i];
        }
        g.canvas[i] = accepted ? chosen[i] : g.sampler->noise(i);
        if (accepted && g.sampler->keeps_tokens()) g.settled[i] = chosen[i];
    }
    result.canvas = g.canvas;
    const double mean_entropy = total_entropy / static_cast<double>(canvas_length(g.params));
    const bool done = g.sampler->is_done(result.draft, result.accepted, mean_entropy);
    g.step -= 1;
    result.canvas_done = done || g.step == 0;
    if (g.params.trim_after_eos && !g.params.guided && !result.canvas_done) trim(result);
}

// An eos has settled once it was accepted at the same position in three consecutive steps. The positions
// after it, except for a few that the text may still grow into, then stay as this step left them: visible,
// but no longer denoised.
void Session::trim(const StepResult& result) {
    constexpr size_t kSlack = 8;
    constexpr int32_t kSteps = 3;
    Generation& g = *generation_;
    const size_t n = g.canvas.size(), end = end_of(result.draft);
    const bool ended = end < n && result.accepted[end];
    g.n_same_eos = ended ? (end == g.eos_at ? g.n_same_eos + 1 : 1) : 0;
    g.eos_at = end;
    const size_t n_kept = end + 1 + kSlack;
    if (g.n_same_eos < kSteps || n_kept >= n) return;
    for (size_t i = n_kept; i < n; ++i) {
        if (is_held(i)) return;
    }
    for (size_t i = n_kept; i < n; ++i) g.frozen_entropy += result.entropy[i];
    g.canvas.resize(n_kept);
    g.settled.resize(n_kept);
}

// Completes the step's result: tokens of a finished canvas, finish reason, timings.
void Session::report(StepResult& result) {
    if (result.canvas_done) finish_canvas(result);
    result.encode_seconds = generation_->encode_seconds;
    result.denoise_seconds = generation_->denoise_seconds;
    generation_->done = result.finish != Finish::none;
}

void Session::finish_canvas(StepResult& result) {
    Generation& g = *generation_;
    const auto end = result.draft.begin() + static_cast<int64_t>(end_of(result.draft));
    result.tokens.assign(result.draft.begin(), end);

    const size_t room = static_cast<size_t>(g.params.max_tokens - g.n_generated);
    if (result.tokens.size() > room) {
        result.tokens.resize(room);
        result.finish = Finish::length;
    } else if (end != result.draft.end()) {
        result.finish = Finish::eos;
    } else if (result.tokens.size() == room) {
        result.finish = Finish::length;
    } else if (context_full(g.canvas.size())) {
        result.finish = Finish::context;
    }
    g.n_added = static_cast<int32_t>(result.tokens.size());
    g.n_generated += g.n_added;
    g.finished = result.draft;
    g.canvas_index += 1;
    g.step = 0;
}

// Whether the context has no room for another canvas after n_more tokens.
bool Session::context_full(size_t n_more) const {
    return n_past() + static_cast<int64_t>(n_more) + canvas_length(generation_->params) > n_ctx_;
}

// Position of a draft's first eos, or its size if it has none.
size_t Session::end_of(const std::vector<int32_t>& draft) const {
    const std::vector<int32_t>& eos = generation_->params.eos;
    return std::find_first_of(draft.begin(), draft.end(), eos.begin(), eos.end()) - draft.begin();
}

// --- the caller's part in a step ---

Candidates Session::candidates(int32_t k, const std::vector<int32_t>& extra) {
    if (!generation_ || !generation_->pending) {
        throw Error(ErrorKind::argument, "no guided step is pending: call next_step first");
    }
    const int64_t n_vocab = model_->hparams.n_vocab;
    if (k < 1 || k > n_vocab)
        throw Error(ErrorKind::argument,
                    format("k is %d; it must be 1 to %lld", k, static_cast<long long>(n_vocab)));
    return canvas_state_.candidates(static_cast<int64_t>(generation_->canvas.size()), k, extra);
}

void Session::impose(const std::vector<int32_t>& tokens, StepResult& result) {
    if (!generation_ || !generation_->pending) {
        throw Error(ErrorKind::argument, "no guided step is pending: call next_step first");
    }
    if (tokens.size() != generation_->canvas.size()) {
        throw Error(ErrorKind::argument,
                    format("got %zu tokens for a canvas of %zu", tokens.size(), generation_->canvas.size()));
    }
    result = std::move(*generation_->pending);
    generation_->pending.reset();
    apply_tokens(result, tokens);
    report(result);
}

Finish Session::amend(const std::vector<int32_t>& tokens) {
    if (!generation_ || generation_->step != 0 || generation_->finished.empty()) {
        throw Error(ErrorKind::argument, "no finished canvas to amend");
    }
    Generation& g = *generation_;
    if (tokens.empty() || tokens.size() > static_cast<size_t>(canvas_length(g.params))) {
        throw Error(ErrorKind::argument,
                    format("got %zu tokens to replace a canvas of %d; expected 1 to %d", tokens.size(),
                           canvas_length(g.params), canvas_length(g.params)));
    }
    g.n_generated += static_cast<int32_t>(tokens.size()) - g.n_added;
    g.n_added = static_cast<int32_t>(tokens.size());
    g.finished = tokens;
    const Finish finish = g.n_generated >= g.params.max_tokens ? Finish::length
                          : context_full(tokens.size())        ? Finish::context
                                                               : Finish::none;
    g.done = finish != Finish::none;
    return finish;
}

// --- the caller's canvas ---

// Index of a position of the current canvas in the caller's, which counts from the start of the generation.
size_t Session::given_index(size_t i) const {
    return static_cast<size_t>(generation_->canvas_index) * canvas_length(generation_->params) + i;
}

// The caller's token for a position of the current canvas, or -1.
int32_t Session::given_token(size_t i) const {
    const std::vector<int32_t>& given = generation_->params.canvas;
    return given_index(i) < given.size() ? given[given_index(i)] : -1;
}

bool Session::is_held(size_t i) const {
    const std::vector<uint8_t>& hold = generation_->params.hold;
    return given_index(i) < hold.size() && hold[given_index(i)];
}

// --- what a generation is begun with ---

void Session::check_params(const GenerationParams& params) const {
    const auto require = [](bool ok, const char* what) {
        if (!ok) throw Error(ErrorKind::argument, what);
    };
    require(params.max_tokens >= 1, "max_tokens must be at least 1");
    require(params.sampler.steps() >= 1, "steps must be at least 1");
    require(params.dropped_mass >= 0.0f && params.dropped_mass < 1.0f,
            "dropped_mass must be at least 0 and below 1");
    if (params.canvas_length < 0 || params.canvas_length > model_->hparams.canvas_length) {
        throw Error(ErrorKind::argument, format("canvas_length is %d; this model allows 1 to %d",
                                                params.canvas_length, model_->hparams.canvas_length));
    }
    const int32_t canvas = canvas_length(params);
    if (n_past() + canvas > n_ctx_) {
        throw Error(
            ErrorKind::context_overflow,
            format("a canvas of %d tokens after %d tokens does not fit the context of %d: open a session "
                   "with a larger n_ctx",
                   canvas, n_past(), n_ctx_));
    }
}

void Session::check_hold(const GenerationParams& params) const {
    if (params.hold.size() > params.canvas.size()) {
        throw Error(ErrorKind::argument, format("hold has %zu positions, but canvas has %zu",
                                                params.hold.size(), params.canvas.size()));
    }
    for (size_t i = 0; i < params.hold.size(); ++i) {
        if (params.hold[i] && params.canvas[i] < 0) {
            throw Error(ErrorKind::argument,
                        format("hold is set at position %zu, but canvas has no token there", i));
        }
    }
}

}  // namespace pydiffusion
