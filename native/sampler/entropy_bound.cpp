#include "sampler/entropy_bound.h"

#include <algorithm>
#include <numeric>

#include "sampler/philox.h"
#include "util/error.h"

namespace pydiffusion {

float step_temperature(int32_t step, int32_t n_steps, float t_min, float t_max) {
    return t_min + (t_max - t_min) * (static_cast<float>(step) / static_cast<float>(n_steps));
}

std::vector<uint8_t> accept(const float* entropy, size_t n, float bound) {
    std::vector<size_t> order(n);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [entropy](size_t a, size_t b) { return entropy[a] < entropy[b]; });
    std::vector<uint8_t> accepted(n, 0);
    double running = 0.0;
    for (const size_t i : order) {
        if (!(running <= bound)) break;
        accepted[i] = 1;
        running += entropy[i];
    }
    return accepted;
}

EntropyBoundSampler::EntropyBoundSampler(const SamplerParams& params, int32_t n_vocab)
    : steps_(params.steps()),
      t_min_(params.number("t_min")),
      t_max_(params.number("t_max")),
      entropy_bound_(params.number("entropy_bound")),
      confidence_threshold_(params.number("confidence_threshold")),
      stability_threshold_(params.count("stability_threshold")),
      seed_(params.seed),
      n_vocab_(n_vocab) {
    const auto require = [](bool ok, const char* what) {
        if (!ok) throw Error(ErrorKind::argument, what);
    };
    require(t_min_ >= 0.0f && t_max_ >= t_min_ && t_max_ > 0.0f && t_max_ <= 1e6f,
            "temperatures must satisfy 0 <= t_min <= t_max and 0 < t_max");
    require(entropy_bound_ >= 0.0f, "entropy_bound must be at least 0");
    require(stability_threshold_ >= 0, "stability_threshold must be at least 0");
    require(confidence_threshold_ >= 0.0f, "confidence_threshold must be at least 0");
}

void EntropyBoundSampler::begin_canvas(int32_t canvas_index) {
    canvas_index_ = canvas_index;
    step_ = 0;
    history_.clear();
}

void EntropyBoundSampler::begin_step(int32_t step, StepState& state) {
    step_ = step;
    state.previous_temperature = temperature(step < steps_ ? step + 1 : step);
    state.temperature = temperature(step);
    for (size_t i = 0; i < state.u.size(); ++i)
        state.u[i] = random_draw(seed_, canvas_index_, step, i, n_vocab_).u;
}

float EntropyBoundSampler::temperature(int32_t step) const {
    return step_temperature(step, steps_, t_min_, t_max_);
}

int32_t EntropyBoundSampler::noise(size_t position) const {
    return random_draw(seed_, canvas_index_, step_, position, n_vocab_).token;
}

// A settled position adds nothing to the sum of entropies, so it is accepted without being asked for.
std::vector<uint8_t> EntropyBoundSampler::accept(const std::vector<float>& entropy,
                                                 const std::vector<int32_t>&) const {
    return pydiffusion::accept(entropy.data(), entropy.size(), entropy_bound_);
}

bool EntropyBoundSampler::is_done(const std::vector<int32_t>& draft, const std::vector<uint8_t>&,
                                  double mean_entropy) {
    const bool stable = is_stable(draft);  // adds to the history, whatever the entropy
    return stable && mean_entropy < confidence_threshold_;
}

// Compares the positions still denoised with the same of the last drafts.
bool EntropyBoundSampler::is_stable(const std::vector<int32_t>& draft) {
    const auto n = static_cast<size_t>(stability_threshold_);
    const auto is_same = [&](const std::vector<int32_t>& past) {
        return std::equal(draft.begin(), draft.end(), past.begin());
    };
    const bool stable = history_.size() == n && std::all_of(history_.begin(), history_.end(), is_same);
    history_.push_back(draft);
    if (history_.size() > n) history_.erase(history_.begin());
    return stable;
}

std::unique_ptr<Sampler> make_entropy_bound(const SamplerParams& params, int32_t n_vocab, int32_t) {
    return std::make_unique<EntropyBoundSampler>(params, n_vocab);
}

}  // namespace pydiffusion
