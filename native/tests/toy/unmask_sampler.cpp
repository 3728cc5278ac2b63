#include "toy/unmask_sampler.h"

#include <algorithm>

#include "util/error.h"

namespace pydiffusion {
namespace testing {

void UnmaskSampler::begin_step(int32_t step, StepState& state) {
    n_left_ = step;
    state.previous_temperature = state.temperature = 1.0f;
    std::fill(state.u.begin(), state.u.end(), 0.0f);  // nothing is drawn
}

std::vector<uint8_t> UnmaskSampler::accept(const std::vector<float>& entropy,
                                           const std::vector<int32_t>& settled) const {
    std::vector<uint8_t> accepted(entropy.size(), 1);
    std::vector<size_t> masked;
    for (size_t i = 0; i < entropy.size(); ++i) {
        if (settled[i] >= 0) continue;
        accepted[i] = 0;
        masked.push_back(i);
    }
    std::stable_sort(masked.begin(), masked.end(),
                     [&](size_t a, size_t b) { return entropy[a] < entropy[b]; });
    const auto n_steps = static_cast<size_t>(n_left_);
    const size_t n_accepted = masked.size() / n_steps + (masked.size() % n_steps != 0);
    for (size_t k = 0; k < n_accepted; ++k) accepted[masked[k]] = 1;
    return accepted;
}

bool UnmaskSampler::is_done(const std::vector<int32_t>&, const std::vector<uint8_t>& accepted, double) {
    return std::all_of(accepted.begin(), accepted.end(), [](uint8_t flag) { return flag != 0; });
}

const SamplerTable& unmask_table() {
    static const SamplerTable table = {
        "unmask", {{"steps", "diffusion.max_steps", true, 8, 1, 1 << 20}}, nullptr};
    return table;
}

std::unique_ptr<Sampler> make_unmask(const SamplerParams&, int32_t, int32_t mask_token) {
    if (mask_token < 0) throw Error(ErrorKind::unsupported, "the unmask sampler needs a mask token");
    return std::make_unique<UnmaskSampler>(mask_token);
}

}  // namespace testing
}  // namespace pydiffusion
