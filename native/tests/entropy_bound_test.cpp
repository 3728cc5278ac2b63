// The entropy-bound rule, the temperatures of a schedule and the stop rule, worked out by hand.
#include "sampler/entropy_bound.h"

#include <cmath>
#include <limits>

#include "sampler/philox.h"
#include "sampler/registry.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

using Accepted = std::vector<uint8_t>;

Accepted accepted(const std::vector<float>& entropy, float bound) {
    return accept(entropy.data(), entropy.size(), bound);
}

}  // namespace

TEST_CASE("in ascending order while the sum of those before is within the bound") {
    // In order: 0.125, 0.25, 0.5, 1.0; the sums before each: 0, 0.125, 0.375, 0.875.
    const std::vector<float> entropy = {0.5f, 0.125f, 1.0f, 0.25f};
    CHECK(accepted(entropy, 0.0f) == Accepted{0, 1, 0, 0});  // the first, always
    CHECK(accepted(entropy, 0.12f) == Accepted{0, 1, 0, 0});
    CHECK(accepted(entropy, 0.125f) == Accepted{0, 1, 0, 1});  // at most the bound: equal is enough
    CHECK(accepted(entropy, 0.374f) == Accepted{0, 1, 0, 1});
    CHECK(accepted(entropy, 0.375f) == Accepted{1, 1, 0, 1});
    CHECK(accepted(entropy, 0.875f) == Accepted{1, 1, 1, 1});
}

TEST_CASE("equal entropies in order of position") {
    CHECK(accepted({0.5f, 0.5f, 0.5f, 0.5f}, 0.0f) == Accepted{1, 0, 0, 0});
    CHECK(accepted({0.5f, 0.5f, 0.5f, 0.5f}, 0.5f) == Accepted{1, 1, 0, 0});
    CHECK(accepted({0.5f, 0.0f, 0.5f, 0.0f}, 0.25f) == Accepted{1, 1, 0, 1});
}

TEST_CASE("certain positions cost nothing") {
    CHECK(accepted({0.0f, 0.0f, 0.0f, 0.0f}, 0.0f) == Accepted{1, 1, 1, 1});
    CHECK(accepted({0.0f, 0.1f, 0.0f, 0.2f}, 0.0f) == Accepted{1, 1, 1, 0});
}

TEST_CASE("no position, one position, no bound") {
    CHECK(accepted({}, 1.0f).empty());
    CHECK(accepted({9.0f}, 0.0f) == Accepted{1});
    CHECK(accepted({9.0f}, -1.0f) == Accepted{0});
    CHECK(accepted({9.0f, 8.0f}, std::numeric_limits<float>::infinity()) == Accepted{1, 1});
}

TEST_CASE("the sum is not float's") {
    // 1 + 2^24 is 2^24 in float, which would be within the bound.
    const std::vector<float> large = {1.0f, 0x1p24f, 0x1p24f, 0x1p24f};
    CHECK(accepted(large, 0x1p24f) == Accepted{1, 1, 0, 0});
    CHECK(accepted(large, 0x1p24f + 2.0f) == Accepted{1, 1, 1, 0});
}

TEST_CASE("temperatures fall from t_max to just above t_min") {
    CHECK(step_temperature(4, 4, 0.5f, 0.9f) == doctest::Approx(0.9));
    CHECK(step_temperature(3, 4, 0.5f, 0.9f) == doctest::Approx(0.8));
    CHECK(step_temperature(2, 4, 0.5f, 0.9f) == doctest::Approx(0.7));
    CHECK(step_temperature(1, 4, 0.5f, 0.9f) == doctest::Approx(0.6));
    CHECK(step_temperature(1, 1, 0.5f, 0.9f) == doctest::Approx(0.9));
    CHECK(step_temperature(7, 48, 0.7f, 0.7f) == 0.7f);
}

namespace {

using Tokens = std::vector<int32_t>;

// Feeds drafts to a new canvas; returns the index of the one that ends it, or -1.
int ends_at(EntropyBoundSampler& sampler, const std::vector<Tokens>& drafts, double mean_entropy) {
    sampler.begin_canvas(0);
    for (size_t i = 0; i < drafts.size(); ++i) {
        if (sampler.is_done(drafts[i], Accepted(drafts[i].size(), 1), mean_entropy))
            return static_cast<int>(i);
    }
    return -1;
}

EntropyBoundSampler with_stability(int32_t threshold) {
    SamplerParams params = {entropy_bound_table().reference_defaults(), 0};
    params.values["stability_threshold"] = threshold;
    params.values["confidence_threshold"] = 0.5;
    return EntropyBoundSampler(params, 64);
}

}  // namespace

TEST_CASE("done when the draft stays the same and the entropy is low") {
    const Tokens a = {1, 2, 3}, b = {1, 2, 4};
    EntropyBoundSampler none = with_stability(0), one = with_stability(1), two = with_stability(2);
    CHECK(ends_at(none, {a, b}, 0.1) == 0);
    CHECK(ends_at(one, {a, b, b, b}, 0.1) == 2);
    CHECK(ends_at(two, {a, b, b, b}, 0.1) == 3);
    CHECK(ends_at(two, {a, b, b, a}, 0.1) == -1);
    CHECK(ends_at(one, {a, a}, 0.5) == -1);  // must be below the threshold
    CHECK(ends_at(one, {a, a}, 0.49) == 1);
    CHECK(ends_at(one, {a}, 0.1) == -1);  // the last canvas ended with the same draft
}

TEST_CASE("drafts are compared while the entropy is high too") {
    EntropyBoundSampler sampler = with_stability(1);
    const Tokens draft = {1, 2, 3};
    sampler.begin_canvas(0);
    CHECK_FALSE(sampler.is_done(draft, {1, 1, 1}, 2.0));
    CHECK(sampler.is_done(draft, {1, 1, 1}, 0.1));
}

TEST_CASE("positions that are no longer denoised are not compared") {
    EntropyBoundSampler sampler = with_stability(2);
    CHECK(ends_at(sampler, {{1, 2, 3, 4}, {1, 2, 9, 9}, {1, 2}}, 0.1) == 2);
    CHECK(ends_at(sampler, {{1, 2, 3, 4}, {1, 5, 3, 4}, {1, 2}}, 0.1) == -1);
}

TEST_CASE("noise and uniforms are Philox's for canvas, step and position") {
    SamplerParams params = {entropy_bound_table().reference_defaults(), 77};
    params.values["steps"] = 4;
    params.values["t_min"] = 0.5;
    params.values["t_max"] = 0.9;
    EntropyBoundSampler sampler(params, 64);
    StepState state;
    state.u.resize(3);
    sampler.begin_canvas(5);
    for (const int32_t step : {0, 4, 3}) {
        CAPTURE(step);
        if (step > 0) sampler.begin_step(step, state);
        for (uint32_t i = 0; i < 3; ++i) {
            CHECK(sampler.noise(i) == random_draw(77, 5, step, i, 64).token);
            if (step > 0) CHECK(state.u[i] == random_draw(77, 5, step, i, 64).u);
        }
    }
    CHECK(state.temperature == doctest::Approx(0.8));
    CHECK(state.previous_temperature == doctest::Approx(0.9));
    sampler.begin_canvas(6);
    CHECK(sampler.noise(2) == random_draw(77, 6, 0, 2, 64).token);
}

TEST_CASE("an accepted position gets the sampled token, and may change again") {
    const EntropyBoundSampler sampler = with_stability(1);
    CHECK(sampler.choose({3, 5, 0.1f}) == 5);
    CHECK_FALSE(sampler.keeps_tokens());
    CHECK(sampler.accept({0.0f, 0.05f, 0.2f, 0.3f}, {7, -1, -1, -1}) == Accepted{1, 1, 1, 0});
}

}  // namespace testing
}  // namespace pydiffusion
