// Entropy-bound sampler: uniform noise, positions accepted by their entropy, temperatures that fall linearly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "sampler/sampler.h"

namespace pydiffusion {

// Temperature of step n of N, n counted down from N to 1: t_min + (t_max - t_min) * n / N.
float step_temperature(int32_t step, int32_t n_steps, float t_min, float t_max);

// The entropy-bound rule of arXiv 2505.24857: in ascending order of entropy, accepts a position while the sum
// of the entropies before it is at most `bound`. Ties are in order of position.
std::vector<uint8_t> accept(const float* entropy, size_t n, float bound);

// Positions that a step does not accept get a new random token. A canvas is done once its draft has not
// changed for stability_threshold steps and its mean entropy is below confidence_threshold.
class EntropyBoundSampler : public Sampler {
  public:
    // Throws Error(argument) for invalid parameters.
    EntropyBoundSampler(const SamplerParams& params, int32_t n_vocab);

    void begin_canvas(int32_t canvas_index) override;
    void begin_step(int32_t step, StepState& state) override;
    int32_t noise(size_t position) const override;
    std::vector<uint8_t> accept(const std::vector<float>& entropy,
                                const std::vector<int32_t>& settled) const override;
    int32_t choose(const Measure& measure) const override { return measure.sampled; }
    bool keeps_tokens() const override { return false; }
    bool is_done(const std::vector<int32_t>& draft, const std::vector<uint8_t>& accepted,
                 double mean_entropy) override;

  private:
    float temperature(int32_t step) const;
    bool is_stable(const std::vector<int32_t>& draft);

    int32_t steps_;
    float t_min_, t_max_, entropy_bound_, confidence_threshold_;
    int32_t stability_threshold_;
    uint64_t seed_;
    int32_t n_vocab_;
    int32_t canvas_index_ = 0;
    int32_t step_ = 0;                           // 0: before the canvas's first step
    std::vector<std::vector<int32_t>> history_;  // the last stability_threshold drafts
};

std::unique_ptr<Sampler> make_entropy_bound(const SamplerParams& params, int32_t n_vocab, int32_t mask_token);

}  // namespace pydiffusion
