// The sampler's random numbers against the known answers that Random123 publishes for philox4x32-10.
#include "sampler/philox.h"

#include <array>

#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

using Counter = std::array<uint32_t, 4>;
using Key = std::array<uint32_t, 2>;

// Philox4x32-10 as figure 2 of the paper has it, one round after the other.
Counter philox(Counter c, Key k) {
    const auto high = [](uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); };
    for (uint32_t round = 0; round < 10; ++round) {
        const uint32_t k0 = k[0] + round * 0x9E3779B9u, k1 = k[1] + round * 0xBB67AE85u;
        c = {high(0xCD9E8D57u, c[2]) ^ c[1] ^ k0, 0xCD9E8D57u * c[2], high(0xD2511F53u, c[0]) ^ c[3] ^ k1,
             0xD2511F53u * c[0]};
    }
    return c;
}

constexpr int32_t kHalf = 1 << 16;  // a vocabulary that shows the upper half of a word

}  // namespace

TEST_CASE("known answers") {
    CHECK(philox({0, 0, 0, 0}, {0, 0}) == Counter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
    CHECK(philox({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}) ==
          Counter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
    CHECK(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
          Counter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
    // The first of these is also a draw: of seed, canvas, step and position 0.
    const Draw draw = random_draw(0, 0, 0, 0, kHalf);
    CHECK(draw.u == static_cast<float>(0x6627e8) / 16777216.0f);
    CHECK(draw.token == 0xe169);
}

TEST_CASE("the key is the seed, the counter position, step and canvas") {
    const uint64_t seeds[] = {0, 1, 0xffffffff, 0x100000000, 0x299f31d0a4093822, UINT64_MAX};
    const uint32_t words[] = {0, 1, 255, 0xffffffff};
    for (const uint64_t seed : seeds) {
        const Key key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
        for (const uint32_t canvas : words) {
            for (const uint32_t step : words) {
                for (const uint32_t position : words) {
                    const Counter expected = philox({position, step, canvas, 0}, key);
                    const Draw draw = random_draw(seed, canvas, step, position, kHalf);
                    CHECK(draw.u == static_cast<float>(expected[0] >> 8) / 16777216.0f);
                    CHECK(draw.token == static_cast<int32_t>(expected[1] >> 16));
                }
            }
        }
    }
}

TEST_CASE("uniforms below 1, and tokens of the whole vocabulary, evenly") {
    constexpr int n = 40000, n_vocab = 10;
    double sum = 0.0;
    int counts[n_vocab] = {};
    for (uint32_t i = 0; i < n; ++i) {
        const Draw draw = random_draw(7, 0, 1, i, n_vocab);
        REQUIRE(draw.u >= 0.0f);
        REQUIRE(draw.u < 1.0f);
        REQUIRE(draw.token >= 0);
        REQUIRE(draw.token < n_vocab);
        sum += draw.u;
        ++counts[draw.token];
    }
    CHECK(sum / n == doctest::Approx(0.5).epsilon(0.02));
    for (const int count : counts) CHECK(count == doctest::Approx(n / n_vocab).epsilon(0.06));
    CHECK(random_draw(7, 0, 1, 0, 1).token == 0);
    CHECK(random_draw(UINT64_MAX, 1, 2, 3, INT32_MAX).token >= 0);
}

}  // namespace testing
}  // namespace pydiffusion
