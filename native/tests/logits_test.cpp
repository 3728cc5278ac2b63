// One row of logits: capped, measured, drawn from, made probabilities.
#include "sampler/logits.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using Row = std::vector<float>;

Measure measure(const Row& logits, float temperature = 1.0f, float u = 0.0f) {
    return measure_row(logits.data(), static_cast<int64_t>(logits.size()), temperature, u);
}

// Logits whose probabilities at temperature 1 are 0.1, 0.2, 0.3, 0.4.
Row tenths() { return {std::log(1.0f), std::log(2.0f), std::log(3.0f), std::log(4.0f)}; }

// In double precision.
std::vector<double> softmax(const Row& logits, double temperature) {
    const double maximum = *std::max_element(logits.begin(), logits.end());
    std::vector<double> p;
    for (const float x : logits) p.push_back(std::exp((static_cast<double>(x) - maximum) / temperature));
    const double sum = std::accumulate(p.begin(), p.end(), 0.0);
    for (double& x : p) x /= sum;
    return p;
}

double entropy_of(const std::vector<double>& p) {
    double entropy = 0.0;
    for (const double x : p) entropy -= x > 0.0 ? x * std::log(x) : 0.0;
    return entropy;
}

}  // namespace

TEST_CASE("draws by the inverse CDF") {
    // Cumulated: 0.1, 0.3, 0.6, 1.
    const auto drawn = [](float temperature, float u) { return measure(tenths(), temperature, u).sampled; };
    CHECK(drawn(1.0f, 0.0f) == 0);
    CHECK(drawn(1.0f, 0.099f) == 0);
    CHECK(drawn(1.0f, 0.101f) == 1);
    CHECK(drawn(1.0f, 0.299f) == 1);
    CHECK(drawn(1.0f, 0.301f) == 2);
    CHECK(drawn(1.0f, 0.599f) == 2);
    CHECK(drawn(1.0f, 0.601f) == 3);
    CHECK(drawn(1.0f, 1.0f - 0x1p-24f) == 3);
    // Temperature 1/2 squares them: 1/30, 5/30, 14/30, 1.
    CHECK(drawn(0.5f, 0.033f) == 0);
    CHECK(drawn(0.5f, 0.034f) == 1);
    CHECK(drawn(0.5f, 0.166f) == 1);
    CHECK(drawn(0.5f, 0.167f) == 2);
    CHECK(drawn(0.5f, 0.466f) == 2);
    CHECK(drawn(0.5f, 0.467f) == 3);
    // A temperature of next to nothing is the argmax.
    for (const float u : {0.0f, 0.5f, 0.99f}) CHECK(drawn(1e-45f, u) == 3);
}

TEST_CASE("draws from a long row") {
    const Row logits = random_values(5000, 1, 2.0f);
    const std::vector<double> p = softmax(logits, 0.7);
    double before = 0.0;
    int n_checked = 0;
    for (size_t token = 0; token < p.size(); before += p[token++]) {
        if (p[token] < 1e-4) continue;  // u and the sums are no finer
        CHECK(measure(logits, 0.7f, static_cast<float>(before + p[token] / 2)).sampled ==
              static_cast<int32_t>(token));
        ++n_checked;
    }
    CHECK(n_checked > 500);
}

TEST_CASE("entropy in nats") {
    CHECK(measure(tenths()).entropy == doctest::Approx(1.2798542).epsilon(1e-6));
    CHECK(measure(tenths(), 0.5f).entropy ==
          doctest::Approx(entropy_of({1 / 30., 4 / 30., 9 / 30., 16 / 30.})));
    CHECK(measure({5.0f}).entropy == 0.0f);
    CHECK(measure({0.0f, 200.0f, 0.0f}).entropy == doctest::Approx(0.0));
    const Row logits = random_values(3001, 2, 3.0f);
    for (const float temperature : {0.4f, 1.0f, 2.5f})
        CHECK(measure(logits, temperature).entropy ==
              doctest::Approx(entropy_of(softmax(logits, temperature))).epsilon(1e-5));
}

TEST_CASE("entropy of n equal logits is log n") {
    for (const size_t n : {1, 2, 7, 63, 64, 65, 2047, 2048, 2049, 262144}) {
        CAPTURE(n);
        for (const float level : {0.0f, -20.0f, 29.5f})
            CHECK(measure(Row(n, level)).entropy ==
                  doctest::Approx(std::log(static_cast<double>(n))).epsilon(1e-6));
    }
}

TEST_CASE("argmax is the first of equal maxima") {
    CHECK(measure({1.0f, 3.0f, 3.0f, 2.0f}).argmax == 1);
    CHECK(measure(Row(5000, 0.25f)).argmax == 0);
    // Around what is summed up at a time, and in what is left over at the end.
    for (const size_t first : {0, 1, 63, 64, 2047, 2048, 4095, 4096, 4990, 4998}) {
        CAPTURE(first);
        Row logits = random_values(5000, 3);
        logits[first] = logits[4999] = 50.0f;
        CHECK(measure(logits).argmax == static_cast<int32_t>(first));
    }
}

TEST_CASE("a token at -infinity is never drawn") {
    const Row logits = {-kInfinity, 1.0f, -kInfinity, 1.0f, -kInfinity};
    CHECK(measure(logits).entropy == doctest::Approx(std::log(2.0)));
    CHECK(measure(logits, 1.0f, 0.0f).sampled == 1);
    CHECK(measure(logits, 1.0f, 0.51f).sampled == 3);
    CHECK(measure(logits, 1.0f, 1.0f - 0x1p-24f).sampled == 3);
    Row long_row(5000, -kInfinity);
    long_row[4321] = -7.0f;
    const Measure found = measure(long_row, 1.0f, 0.5f);
    CHECK(found.argmax == 4321);
    CHECK(found.sampled == 4321);
    CHECK(found.entropy < 1e-30f);  // each of the others weighs 2^-126
}

TEST_CASE("the ends of u are no token without mass") {
    CHECK(measure({-60.0f, 0.0f, -kInfinity}, 1.0f, 0.0f).sampled == 1);  // e^-60 is less than any other u
    // Equal weights all round the same way in float sums: where the total comes out too large, u is beyond
    // the last token, and the last one with mass is drawn.
    for (int i = 0; i < 100; ++i) {
        CAPTURE(i);
        Row logits(2048, -0.01f * static_cast<float>(i));
        logits[0] = 0.0f;
        logits[2047] = -kInfinity;
        CHECK(measure(logits, 1.0f, 1.0f - 0x1p-24f).sampled < 2047);
    }
}

TEST_CASE("NaN, +infinity and nothing but -infinity give an entropy of NaN") {
    for (const float bad : {kNan, -kNan, kInfinity}) {
        for (const size_t at : {0, 63, 64, 2048, 4999}) {
            CAPTURE(at);
            Row logits = random_values(5000, 4);
            logits[at] = bad;
            CHECK(std::isnan(measure(logits).entropy));
            Row capped = logits;  // capping would make 30 of infinity
            Normalizer normalizer = {1.0f, 1.0f, 1.0};
            CHECK(
                std::isnan(cap_and_measure_row(capped.data(), 5000, 30.0f, 1.0f, 0.5f, &normalizer).entropy));
            CHECK(normalizer.weight == 0.0);
            softmax_row(logits.data(), 5000, 1.0f);
            CHECK(std::all_of(logits.begin(), logits.end(), [](float p) { return std::isnan(p); }));
        }
    }
    CHECK(std::isnan(measure(Row(100, -kInfinity)).entropy));
}

TEST_CASE("capping") {
    Row logits = random_values(5000, 5, 20.0f);  // some beyond the cap, most below
    logits[17] = 1e30f;
    logits[18] = -1e30f;
    logits[19] = -kInfinity;
    Row capped = logits;
    const Measure found = cap_and_measure_row(capped.data(), 5000, 30.0f, 0.8f, 0.3f);
    for (size_t i = 0; i < logits.size(); ++i) {
        const double expected = 30.0 * std::tanh(static_cast<double>(logits[i]) / 30.0);
        CHECK(std::fabs(capped[i] - expected) <= 1e-5);
    }
    const Measure alone = measure(capped, 0.8f, 0.3f);
    CHECK(found.argmax == alone.argmax);
    CHECK(found.sampled == alone.sampled);
    CHECK(found.entropy == alone.entropy);
}

TEST_CASE("softmax") {
    for (const size_t n : {1, 4, 64, 2049, 50000}) {
        CAPTURE(n);
        const Row logits = random_values(n, 6, 4.0f);
        const std::vector<double> expected = softmax(logits, 0.6);
        Row p = logits;
        softmax_row(p.data(), static_cast<int64_t>(n), 0.6f);
        double sum = 0.0;
        size_t n_wrong = 0;
        for (size_t i = 0; i < n; ++i) {
            sum += p[i];
            n_wrong += std::fabs(p[i] - expected[i]) > 1e-5 * expected[i] + 1e-13;
        }
        CHECK(sum == doctest::Approx(1.0).epsilon(1e-5));
        CHECK(n_wrong == 0);
    }
    Row p = {0.0f, -29.0f, -31.0f, -kInfinity};  // e^-29 is 2.5e-13, e^-31 is 3.4e-14
    softmax_row(p.data(), 4, 1.0f);
    CHECK(p[0] == doctest::Approx(1.0));
    CHECK(p[1] > 2e-13f);
    CHECK(p[2] == 0.0f);
    CHECK(p[3] == 0.0f);
}

TEST_CASE("softmax with what capping has found") {
    Row logits = random_values(5000, 7, 10.0f);
    Normalizer normalizer;
    cap_and_measure_row(logits.data(), 5000, 30.0f, 0.8f, 0.5f, &normalizer);
    CHECK(normalizer.temperature == 0.8f);
    CHECK(normalizer.maximum == *std::max_element(logits.begin(), logits.end()));
    for (const float temperature : {0.8f, 0.5f}) {  // of the same temperature, and of another
        Row known = logits, alone = logits;
        softmax_row(known.data(), 5000, temperature, normalizer);
        softmax_row(alone.data(), 5000, temperature);
        CHECK(known == alone);
    }
}

TEST_CASE("top k, of equal logits the first") {
    const Row logits = {1.0f, 5.0f, 3.0f, 5.0f, 3.0f, 0.0f, 3.0f};
    const auto best = [&](int32_t k) {
        std::vector<int32_t> tokens(k);
        top_k(logits.data(), static_cast<int64_t>(logits.size()), k, tokens.data());
        return tokens;
    };
    CHECK(best(1) == std::vector<int32_t>{1});
    CHECK(best(2) == std::vector<int32_t>{1, 3});
    CHECK(best(4) == std::vector<int32_t>{1, 3, 2, 4});
    CHECK(best(7) == std::vector<int32_t>{1, 3, 2, 4, 6, 0, 5});

    const Row many = random_values(20000, 8);
    std::vector<int32_t> expected(many.size()), found(100);
    std::iota(expected.begin(), expected.end(), 0);
    std::stable_sort(expected.begin(), expected.end(), [&](int a, int b) { return many[a] > many[b]; });
    expected.resize(found.size());
    top_k(many.data(), 20000, 100, found.data());
    CHECK(found == expected);
}

}  // namespace testing
}  // namespace pydiffusion
