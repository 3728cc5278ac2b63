// Sampler of the toy architecture: masked diffusion that unmasks by confidence, as LLaDA and Dream do.
#pragma once

#include <memory>

#include "sampler/sampler.h"
#include "sampler/sampler_options.h"

namespace pydiffusion {
namespace testing {

// A canvas begins with mask tokens. With s steps left, a step accepts the ceil(m / s) of the m masked
// positions that have the lowest entropy (ties by position), and gives them their argmax for good.
class UnmaskSampler : public Sampler {
  public:
    explicit UnmaskSampler(int32_t mask_token) : mask_token_(mask_token) {}

    void begin_canvas(int32_t) override {}
    void begin_step(int32_t step, StepState& state) override;
    int32_t noise(size_t) const override { return mask_token_; }
    std::vector<uint8_t> accept(const std::vector<float>& entropy,
                                const std::vector<int32_t>& settled) const override;
    int32_t choose(const Measure& measure) const override { return measure.argmax; }
    bool keeps_tokens() const override { return true; }
    bool is_done(const std::vector<int32_t>& draft, const std::vector<uint8_t>& accepted,
                 double mean_entropy) override;

  private:
    int32_t mask_token_;
    int32_t n_left_ = 0;  // steps, counting the current one
};

const SamplerTable& unmask_table();

std::unique_ptr<Sampler> make_unmask(const SamplerParams& params, int32_t n_vocab, int32_t mask_token);

}  // namespace testing
}  // namespace pydiffusion
