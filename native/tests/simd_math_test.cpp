// exp, exp2, tanh and rounding to bfloat16, against the standard library in double precision.
#include "util/simd_math.h"

#include <limits>

#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

// The largest of `error(x)` over evenly spaced x.
template <typename ErrorOf>
double largest(float low, float high, const ErrorOf& error) {
    constexpr int n = 200000;
    double largest = 0.0;
    for (int i = 0; i <= n; ++i) {
        const float x = low + (high - low) * static_cast<float>(i) / n;
        const double found = error(x);
        if (!(found <= largest)) largest = found;  // a NaN stays
    }
    return largest;
}

}  // namespace

TEST_CASE("exp to about 2 ulp, clamped") {
    CHECK(largest(-87.0f, 60.0f,
                  [](float x) { return std::fabs(vector_exp(x) / std::exp(double{x}) - 1.0); }) < 3e-7);
    CHECK(vector_exp(0.0f) == 1.0f);
    CHECK(vector_exp(-1000.0f) == vector_exp(-87.0f));
    CHECK(vector_exp(1000.0f) == vector_exp(60.0f));
    CHECK(vector_exp(std::numeric_limits<float>::quiet_NaN()) == vector_exp(-87.0f));
}

TEST_CASE("exp2") {
    CHECK(largest(-126.0f, 126.0f,
                  [](float x) { return std::fabs(small_exp2(x) / std::exp2(double{x}) - 1.0); }) < 2.5e-7);
    for (int n = -126; n <= 126; ++n) CHECK(small_exp2(static_cast<float>(n)) == std::ldexp(1.0f, n));
}

TEST_CASE("tanh") {
    const auto error_of = [](float found, float x) { return std::fabs(found - std::tanh(double{x})); };
    CHECK(largest(-20.0f, 20.0f, [&](float x) { return error_of(vector_tanh(x), x); }) < 2.5e-7);
    CHECK(largest(-1.0f, 1.0f, [&](float x) { return error_of(small_tanh(x), x); }) < 2.5e-7);
    CHECK(small_tanh(0.0f) == 0.0f);
    CHECK(vector_tanh(100.0f) == 1.0f);
    CHECK(vector_tanh(-100.0f) == -1.0f);
}

TEST_CASE("to the nearest bfloat16, halves to even") {
    CHECK(nearest_bfloat16(1.0f) == 1.0f);
    CHECK(nearest_bfloat16(1.0f + 0x1p-8f) == 1.0f);                       // half: down to even
    CHECK(nearest_bfloat16(1.0f + 0x1p-8f + 0x1p-20f) == 1.0f + 0x1p-7f);  // more than half
    CHECK(nearest_bfloat16(1.0f + 3 * 0x1p-8f) == 1.0f + 0x1p-6f);         // half: up to even
    CHECK(nearest_bfloat16(-1.0f - 3 * 0x1p-8f) == -1.0f - 0x1p-6f);
    CHECK(std::isinf(nearest_bfloat16(std::numeric_limits<float>::infinity())));
    CHECK(std::isnan(nearest_bfloat16(std::numeric_limits<float>::quiet_NaN())));
}

}  // namespace testing
}  // namespace pydiffusion
