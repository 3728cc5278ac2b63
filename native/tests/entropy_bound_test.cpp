// The entropy-bound rule and the temperatures of a schedule, worked out by hand.
#include "sampler/entropy_bound.h"

#include <cmath>
#include <limits>

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

}  // namespace testing
}  // namespace pydiffusion
