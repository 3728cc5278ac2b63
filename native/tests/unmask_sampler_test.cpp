// The toy architecture's sampler against arithmetic by hand.
#include "toy/unmask_sampler.h"

#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

constexpr int32_t kMask = 9;
using Accepted = std::vector<uint8_t>;

Accepted accepted(int32_t n_left, const std::vector<float>& entropy, const std::vector<int32_t>& settled) {
    UnmaskSampler sampler(kMask);
    StepState state;
    sampler.begin_step(n_left, state);
    return sampler.accept(entropy, settled);
}

}  // namespace

TEST_CASE("a step unmasks its share of what is masked, lowest entropy first") {
    const std::vector<float> entropy = {0.5f, 0.125f, 1.0f, 0.25f, 2.0f};
    const std::vector<int32_t> none(5, -1);
    CHECK(accepted(5, entropy, none) == Accepted{0, 1, 0, 0, 0});    // ceil(5 / 5)
    CHECK(accepted(4, entropy, none) == Accepted{0, 1, 0, 1, 0});    // ceil(5 / 4)
    CHECK(accepted(2, entropy, none) == Accepted{1, 1, 0, 1, 0});    // ceil(5 / 2)
    CHECK(accepted(1, entropy, none) == Accepted{1, 1, 1, 1, 1});    // the last step: all
    CHECK(accepted(100, entropy, none) == Accepted{0, 1, 0, 0, 0});  // never none
}

TEST_CASE("equal entropies are unmasked in order of position") {
    CHECK(accepted(2, {1.0f, 1.0f, 1.0f, 1.0f}, std::vector<int32_t>(4, -1)) == Accepted{1, 1, 0, 0});
    CHECK(accepted(2, {1.0f, 0.5f, 1.0f, 0.5f}, std::vector<int32_t>(4, -1)) == Accepted{0, 1, 0, 1});
}

TEST_CASE("settled positions stay accepted and take no other's place") {
    // Masked are positions 1, 3 and 4; token 0 is a token like any other.
    const std::vector<float> entropy = {0.0f, 0.75f, 0.0f, 0.5f, 0.25f};
    const std::vector<int32_t> settled = {7, -1, 0, -1, -1};
    CHECK(accepted(3, entropy, settled) == Accepted{1, 0, 1, 0, 1});  // ceil(3 / 3)
    CHECK(accepted(2, entropy, settled) == Accepted{1, 0, 1, 1, 1});  // ceil(3 / 2)
    CHECK(accepted(3, {0.0f, 0.0f}, {1, 2}) == Accepted{1, 1});       // nothing left to unmask
}

TEST_CASE("masks until accepted, then the argmax; done when nothing is masked") {
    UnmaskSampler sampler(kMask);
    CHECK(sampler.noise(0) == kMask);
    CHECK(sampler.noise(255) == kMask);
    CHECK(sampler.choose({3, 5, 0.1f}) == 3);
    CHECK(sampler.keeps_tokens());
    CHECK_FALSE(sampler.is_done({1, 2, 3}, {1, 0, 1}, 0.0));
    CHECK(sampler.is_done({1, 2, 3}, {1, 1, 1}, 9.0));
}

TEST_CASE("temperature 1 at every step") {
    UnmaskSampler sampler(kMask);
    StepState state;
    state.u.assign(4, 0.5f);
    for (const int32_t step : {48, 2, 1}) {
        state.temperature = state.previous_temperature = 0.3f;
        sampler.begin_step(step, state);
        CHECK(state.temperature == 1.0f);
        CHECK(state.previous_temperature == 1.0f);
    }
}

TEST_CASE("a model without a mask token is refused") {
    CHECK_ERROR(make_unmask(SamplerParams(), 64, -1), unsupported, "mask token");
    CHECK(make_unmask(SamplerParams(), 64, kMask)->noise(0) == kMask);
}

}  // namespace testing
}  // namespace pydiffusion
