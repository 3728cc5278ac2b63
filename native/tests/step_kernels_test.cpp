// The CUDA kernels of a step, run by the emulation: against the same arithmetic in plain loops bit by bit,
// and against the host's StepBackend and sums in double precision.
#include <cmath>

#include "backend/step_backend.h"
#include "matrix.h"
#include "step_kernels_reference.h"
#include "step_kernels_runs.h"

namespace pydiffusion {
namespace testing {

namespace {

// Whether u is in the sampled token's interval of the cumulative distribution, up to rounding.
bool is_draw(const float* x, int64_t n_vocab, float temperature, float u, int32_t sampled) {
    const float maximum = *std::max_element(x, x + n_vocab);
    double total = 0.0, before = 0.0, after = 0.0;
    for (int64_t i = 0; i < n_vocab; ++i) {
        const double weight = std::exp((static_cast<double>(x[i]) - maximum) / temperature);
        if (i < sampled) before += weight;
        if (i <= sampled) after += weight;
        total += weight;
    }
    return u * total >= before - 1e-5 * total && u * total <= after + 1e-5 * total;
}

}  // namespace

namespace {

bool has_sums_of(const std::vector<row::Sums>& found, const std::vector<float>& rows, int64_t n_vocab,
                 float scale) {
    const int64_t n_chunks = row::n_chunks_of(n_vocab);
    for (size_t i = 0; i < found.size(); ++i) {
        const int64_t t = static_cast<int64_t>(i) / n_chunks;
        const row::Sums expected = reference_chunks(&rows[t * n_vocab], n_vocab, scale)[i % n_chunks];
        if (!same(found[i].maximum, expected.maximum) || !same(found[i].weight, expected.weight) ||
            !same(found[i].weighted, expected.weighted))
            return false;
    }
    return true;
}

}  // namespace

TEST_CASE("logits are capped to within rounding, NaN and infinity are not hidden") {
    for (const float cap : {30.0f, 1.0f, 50.0f}) {
        const row::SoftCap capped = row::soft_cap(cap);
        for (const float part : {1e-6f, 1e-3f, 0.1f, 1.0f, 1.001f, 4.0f, 1e6f}) {
            for (const float x : random_values(1000, 6, part * cap)) {
                const double exact = cap * std::tanh(static_cast<double>(x) / cap);
                if (std::fabs(capped(x) - exact) > 2.5e-7 * std::fabs(exact)) FAIL_CHECK("of ", x);
                if (capped(-x) != -capped(x)) FAIL_CHECK("of ", x);
            }
        }
        CHECK((capped(0.0f) == 0.0f && capped(-kInfinity) == -cap));
        CHECK((std::isnan(capped(NAN)) && std::isnan(capped(kInfinity))));
    }
}

TEST_CASE("measure_rows: plain loops, bit by bit, in every order") {
    for (const int64_t n_vocab : vocabularies()) {
        const std::vector<float> logits = awkward_rows(n_vocab);
        const auto n = static_cast<int64_t>(logits.size()) / n_vocab;
        const std::vector<float> u = uniforms(n);
        for (const float temperature : {0.7f, 1e-6f}) {
            for (const Order order : orders()) {
                CAPTURE(n_vocab);
                CAPTURE(static_cast<int>(order));
                std::vector<float> capped = logits;
                for (float& x : capped) x = row::soft_cap(30.0f)(x);
                const Measured found = run_measure(order, logits, n_vocab, temperature, u);
                CHECK(same(found.logits, capped));
                CHECK(has_sums_of(found.chunks, capped, n_vocab, row::scale_of(temperature)));
                for (int64_t t = 0; t < n; ++t) {
                    CAPTURE(t);
                    const Measure expected =
                        reference_measure(&capped[t * n_vocab], n_vocab, temperature, u[t]);
                    CHECK(same(found.measures[t], expected));
                }
            }
        }
    }
}

TEST_CASE("measure_rows: the host's backend, and the distribution in double precision") {
    for (const int64_t n_vocab : vocabularies()) {
        CAPTURE(n_vocab);
        const std::vector<float> logits = awkward_rows(n_vocab);
        const auto n = static_cast<int64_t>(logits.size()) / n_vocab;
        const Matrix matrix(n_vocab, n, logits);
        StepState state;
        state.temperature = 0.7f;
        state.u = uniforms(n);
        state.measures.resize(n);
        make_host_step_backend()->measure(matrix.tensor, n, state);
        const Measured found = run_measure(Order::random, logits, n_vocab, 0.7f, state.u);
        for (int64_t t = 0; t < n; ++t) {
            CAPTURE(t);
            const Measure &measure = found.measures[t], &host = state.measures[t];
            CHECK(measure.argmax == host.argmax);
            CHECK(std::isnan(measure.entropy) == std::isnan(host.entropy));
            if (std::isnan(host.entropy)) continue;
            CHECK(measure.entropy == doctest::Approx(host.entropy).epsilon(1e-4));
            CHECK(is_draw(&found.logits[t * n_vocab], n_vocab, 0.7f, state.u[t], measure.sampled));
        }
    }
}

TEST_CASE("measure_rows: a token with mass, if rounding leaves none") {
    for (const int64_t n_vocab : {33, 1023, 3000}) {
        CAPTURE(n_vocab);
        const std::vector<float> logits = random_values(n_vocab, 1);
        const auto expected = static_cast<int32_t>(n_vocab - 1);
        for (const Order order : orders())
            CHECK(run_measure(order, logits, n_vocab, 0.7f, {1.5f}).measures[0].sampled == expected);
    }
}

TEST_CASE("measure_rows: a whole vocabulary") {
    constexpr int64_t n_vocab = 262144;
    const std::vector<float> logits = random_values(n_vocab, 3, 4.0f), u = {0.6f};
    std::vector<float> capped = logits;
    for (float& x : capped) x = row::soft_cap(30.0f)(x);
    const Measure expected = reference_measure(capped.data(), n_vocab, 0.8f, u[0]);
    for (const Order order : orders())
        CHECK(same(run_measure(order, logits, n_vocab, 0.8f, u).measures[0], expected));
}

namespace {

// The entries of row t's lists, and none behind them.
bool has_lists(const Masses& masses, int64_t t, const Mass& expected) {
    for (int64_t i = 0; i < kMaxGathered; ++i) {
        const bool is_listed = i < static_cast<int64_t>(expected.tokens.size());
        const int64_t at = t * kMaxGathered + i;
        if (masses.tokens[at] != (is_listed ? expected.tokens[i] : -7)) return false;
        if (!same(masses.weights[at], is_listed ? expected.weights[i] : -7.0f)) return false;
    }
    return true;
}

}  // namespace

TEST_CASE("find_mass: plain loops, bit by bit, in every order") {
    int n_gathered = 0, n_dense = 0;
    for (const int64_t n_vocab : vocabularies()) {
        const std::vector<float> logits = masked_rows(n_vocab);
        const auto n = static_cast<int64_t>(logits.size()) / n_vocab;
        for (const float dropped_mass : {1e-4f, 0.0f, 0.05f}) {
            const bool is_first = dropped_mass == 1e-4f;
            if (kDetectsRaces && !is_first) break;
            for (const Order order : is_first ? orders() : std::vector<Order>{Order::random}) {
                CAPTURE(n_vocab);
                CAPTURE(dropped_mass);
                CAPTURE(static_cast<int>(order));
                const Masses found = run_find_mass(order, logits, n_vocab, 1.25f, dropped_mass);
                for (int64_t t = 0; t < n; ++t) {
                    CAPTURE(t);
                    const Mass expected = reference_mass(&logits[t * n_vocab], n_vocab, 1.25f, dropped_mass);
                    const row::Distribution &a = found.distributions[t], &b = expected.distribution;
                    CHECK((same(a.maximum, b.maximum) && same(a.scale, b.scale) && same(a.norm, b.norm) &&
                           same(a.threshold, b.threshold)));
                    CHECK(found.n_kept[t] == expected.n_kept);
                    CHECK(has_lists(found, t, expected));
                    ++(expected.n_kept > kMaxGathered ? n_dense : n_gathered);
                }
            }
        }
    }
    CHECK(n_gathered >= 3);
    CHECK(n_dense >= 3);
}

TEST_CASE("find_mass: as many tokens as a list holds, with the largest entropy and mass left out") {
    constexpr int64_t n_vocab = 17001;
    for (const int n_likely : {kMaxGathered, kMaxGathered + 1}) {
        for (const float dropped_mass : {1e-2f, 1e-4f, 1e-6f}) {
            // The likely tokens are alike, and so are the others, which have not quite the mass.
            std::vector<float> logits(n_vocab, std::log(0.9f * dropped_mass / (n_vocab - n_likely)));
            for (int i = 0; i < n_likely; ++i) logits[i * 16 + 3] = std::log(1.0f / n_likely);
            const Masses found =
                run_find_mass(Order::random, logits, n_vocab, row::scale_of(1.0f), dropped_mass);
            CAPTURE(dropped_mass);
            CHECK(found.n_kept[0] == (n_likely == kMaxGathered ? kMaxGathered : INT32_MAX));
        }
    }
}

TEST_CASE("find_mass: a row that is too flat for a list is not read") {
    constexpr int64_t n_vocab = 17001;
    std::vector<float> logits = random_values(n_vocab, 1);
    const std::vector<row::Sums> chunks =
        run_sum_chunks<false>(Order::forward, logits, n_vocab, row::scale_of(1.0f));
    row::Distribution distribution = {};
    int32_t n_kept = 0;
    emulate(1, kThreads, chunks.size() * sizeof(int32_t), Order::forward, [&] {
        find_mass(nullptr, n_vocab, chunks.data(), row::scale_of(1.0f), 1e-4f, &distribution, &n_kept,
                  nullptr, nullptr);
    });
    CHECK(n_kept == INT32_MAX);
    CHECK(distribution.threshold == row::threshold(row::kThresholds - 1));
}

TEST_CASE("find_mass: a whole vocabulary") {
    constexpr int64_t n_vocab = 262144;
    std::vector<float> logits = random_values(n_vocab, 3, 4.0f);
    for (int i = 0; i < 900; ++i) logits[i * 290] += 25.0f;
    const Mass expected = reference_mass(logits.data(), n_vocab, 1.0f, 1e-3f);
    CHECK(expected.tokens.size() > 300);
    for (const Order order : orders()) {
        const Masses found = run_find_mass(order, logits, n_vocab, 1.0f, 1e-3f);
        CHECK(found.n_kept[0] == expected.n_kept);
        CHECK(has_lists(found, 0, expected));
    }
}

TEST_CASE("pack_lists: lists one after the other") {
    const std::vector<int32_t> first = {0, 5, 5, 5 + 1024, 5 + 1024 + 129};  // lengths 5, 0, 1024, 129
    const std::vector<float> weights = random_values(4 * kMaxGathered, 1);
    std::vector<int32_t> tokens(4 * kMaxGathered);
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 7);
    for (const Order order : orders()) {
        std::vector<int32_t> packed_tokens(first.back());
        std::vector<float> packed_weights(first.back());
        emulate(4, 128, 0, order, [&] {
            pack_lists(first.data(), tokens.data(), weights.data(), packed_tokens.data(),
                       packed_weights.data());
        });
        for (int t = 0; t < 4; ++t) {
            for (int32_t i = first[t]; i < first[t + 1]; ++i) {
                const int32_t from = t * kMaxGathered + i - first[t];
                if (packed_tokens[i] != tokens[from] || packed_weights[i] != weights[from])
                    FAIL_CHECK("at ", i);
            }
        }
    }
}

TEST_CASE("add_gathered: in the order of the list, in parts") {
    const std::vector<int32_t> first = {0, 3, 3, 40, 41};
    constexpr int32_t part = 16;
    for (const int64_t d : {1, 255, 256, 257, 2816}) {
        CAPTURE(d);
        const std::vector<float> rows = random_values(41 * d, 1), weights = random_values(41, 2);
        std::vector<float> expected(4 * d, 0.5f);
        for (int32_t from = 0; from < 41; from += part) {
            for (int t = 0; t < 4; ++t) {
                const int32_t begin = std::max(first[t], from), end = std::min(first[t + 1], from + part);
                if (begin >= end) continue;
                for (int64_t c = 0; c < d; ++c) {
                    float sum = 0.0f;
                    for (int32_t i = begin; i < end; ++i) sum += weights[i] * rows[i * d + c];
                    expected[t * d + c] += 3.0f * sum;
                }
            }
        }
        for (const Order order : orders()) {
            std::vector<float> soft(4 * d, 0.5f);
            for (int32_t from = 0; from < 41; from += part) {
                const std::vector<float> gathered(rows.begin() + from * d,
                                                  rows.begin() + std::min(41, from + part) * d);
                emulate(dim3(4, static_cast<unsigned>((d + 255) / 256)), 256, 0, order, [&] {
                    add_gathered(soft.data(), gathered.data(), weights.data(), first.data(), from,
                                 std::min(41, from + part), d, 3.0f);
                });
            }
            CHECK(same(soft, expected));
        }
    }
}

namespace {

// Of tokens [from, from + n_rows), for the positions named.
template <typename T>
std::vector<T> run_probabilities(Order order, const std::vector<float>& logits, int64_t n_vocab,
                                 const std::vector<row::Distribution>& distributions,
                                 const std::vector<int32_t>& positions, int64_t from, int64_t n_rows) {
    std::vector<T> found(positions.size() * n_rows);
    const dim3 grid(static_cast<unsigned>((n_rows + kProbabilities - 1) / kProbabilities),
                    static_cast<unsigned>(positions.size()));
    emulate(grid, kProbabilityThreads, 0, order, [&] {
        if (n_vocab % 4 == 0 && from % 4 == 0 && n_rows % 4 == 0) {
            dense_probabilities<T, 4>(found.data(), logits.data(), distributions.data(), positions.data(),
                                      n_vocab, from, n_rows);
        } else {
            dense_probabilities<T, 1>(found.data(), logits.data(), distributions.data(), positions.data(),
                                      n_vocab, from, n_rows);
        }
    });
    return found;
}

}  // namespace

TEST_CASE("dense_probabilities and scatter_rows: the positions named, and no others") {
    const std::vector<int32_t> positions = {3, 0};
    constexpr int64_t n_vocab = 3000;
    const std::vector<float> logits = random_values(4 * n_vocab, 1, 3.0f);
    std::vector<row::Distribution> distributions(4);
    for (int t = 0; t < 4; ++t)
        distributions[t] = reference_mass(&logits[t * n_vocab], n_vocab, 1.0f, 0.01f).distribution;
    for (const Order order : orders()) {
        for (const int64_t n_rows : {1, 255, 256, 257, 1500, 3000}) {
            const int64_t from = n_vocab - n_rows;
            const auto probability = [&](int64_t i) {
                const int64_t t = positions[i / n_rows], v = from + i % n_rows;
                return row::probability(distributions[t], logits[t * n_vocab + v]) * 16384.0f;
            };
            const std::vector<__half> found =
                run_probabilities<__half>(order, logits, n_vocab, distributions, positions, from, n_rows);
            for (int64_t i = 0; i < 2 * n_rows; ++i)
                if (found[i].bits != ggml_fp32_to_fp16(probability(i))) FAIL_CHECK("at ", i);
            const std::vector<cuda::Bfloat16> wide = run_probabilities<cuda::Bfloat16>(
                order, logits, n_vocab, distributions, positions, from, n_rows);
            for (int64_t i = 0; i < 2 * n_rows; ++i)
                if (wide[i].bits != ggml_fp32_to_bf16(probability(i)).bits) FAIL_CHECK("at ", i);
            const std::vector<float> sums = random_values(2 * n_rows, 5);  // n_rows serves as d
            std::vector<float> soft(4 * n_rows, 9.0f), expected = soft;
            for (int64_t i = 0; i < 2 * n_rows; ++i)
                expected[positions[i / n_rows] * n_rows + i % n_rows] = 0.25f * sums[i];
            emulate(dim3(2, static_cast<unsigned>((n_rows + 255) / 256)), 256, 0, order,
                    [&] { scatter_rows(soft.data(), sums.data(), positions.data(), n_rows, 0.25f); });
            CHECK(same(soft, expected));
        }
    }
}

TEST_CASE("fill_row: one token of the row, nothing behind it") {
    for (const int64_t n : {1, 255, 256, 257, 3000, 262144}) {
        if (kDetectsRaces && n > 3000) break;
        for (const Order order : orders()) {
            const Matrix row(n, 1, random_values(n, 1));
            make_host_step_backend()->pin(row.tensor, 0, static_cast<int32_t>(n - 1), 5.0f, {});
            std::vector<float> x(n, 1.0f);
            std::vector<row::Sums> chunks(row::n_chunks_of(n));
            emulate(static_cast<unsigned>((n + 255) / 256), 256, 0, order,
                    [&] { fill_row(x.data(), n, static_cast<int32_t>(n - 1), 5.0f, chunks.data()); });
            const std::vector<row::Sums> expected = reference_chunks(x.data(), n, 1.25f);
            for (size_t c = 0; c < chunks.size(); ++c) {
                CHECK((same(chunks[c].maximum, expected[c].maximum) &&
                       chunks[c].weight == expected[c].weight && chunks[c].weighted == expected[c].weighted));
            }
            CHECK(same(x, std::vector<float>(row.data(), row.data() + n)));
        }
    }
}

namespace {

constexpr int64_t kVocab = 3000, kEmbd = 40, kPart = 700;  // kPart: embedding rows at a time

// The embeddings of the tokens kept, for the rows that keep few enough.
void run_gather(Order order, const Masses& masses, const std::vector<int32_t>& first,
                const std::vector<float>& embedding, float scale, std::vector<float>& soft) {
    const auto n = static_cast<unsigned>(first.size() - 1);
    std::vector<int32_t> tokens(first.back());
    std::vector<float> weights(first.back());
    emulate(n, 128, 0, order, [&] {
        pack_lists(first.data(), masses.tokens.data(), masses.weights.data(), tokens.data(), weights.data());
    });
    for (int32_t from = 0; from < first.back(); from += kPart) {
        const int32_t to = std::min<int32_t>(first.back(), from + kPart);
        std::vector<float> rows;
        for (int32_t i = from; i < to; ++i) {
            const auto row = embedding.begin() + tokens[i] * kEmbd;
            rows.insert(rows.end(), row, row + kEmbd);
        }
        emulate(n, 256, 0, order, [&] {
            add_gathered(soft.data(), rows.data(), weights.data(), first.data(), from, to, kEmbd, scale);
        });
    }
}

// The matmul of the rows `dense`, in double precision in place of cuBLAS.
void run_dense(Order order, const std::vector<float>& logits, const Masses& masses,
               const std::vector<int32_t>& dense, const std::vector<float>& embedding, float scale,
               std::vector<float>& soft) {
    std::vector<double> sums(dense.size() * kEmbd);
    for (int64_t from = 0; from < kVocab; from += kPart) {
        const int64_t n_rows = std::min(kPart, kVocab - from);
        const std::vector<__half> p =
            run_probabilities<__half>(order, logits, kVocab, masses.distributions, dense, from, n_rows);
        for (size_t i = 0; i < sums.size(); ++i) {
            for (int64_t r = 0; r < n_rows; ++r) {
                const float weight = __half2float(p[i / kEmbd * n_rows + r]);
                sums[i] += double{weight} * embedding[(from + r) * kEmbd + i % kEmbd];
            }
        }
    }
    const std::vector<float> rounded(sums.begin(), sums.end());
    emulate(static_cast<unsigned>(dense.size()), 256, 0, order,
            [&] { scatter_rows(soft.data(), rounded.data(), dense.data(), kEmbd, scale / kHalfScale); });
}

}  // namespace

TEST_CASE("the kernels of self-conditioning together: the host's backend") {
    std::vector<float> logits;
    for (const float scale : {8.0f, 0.5f, 40.0f}) {  // the second row is dense
        const std::vector<float> row = random_values(kVocab, 1, scale);
        logits.insert(logits.end(), row.begin(), row.end());
    }
    const std::vector<float> embedding = random_values(kVocab * kEmbd, 4);
    const Matrix logits_matrix(kVocab, 3, logits), embedding_matrix(kEmbd, kVocab, embedding),
        soft_matrix(kEmbd, 3, std::vector<float>(3 * kEmbd));
    StepState state;
    state.self_conditioning = true;
    state.previous_temperature = 0.8f;
    state.dropped_mass = 1e-4f;
    state.embedding_scale = 2.0f;
    make_host_step_backend()->condition(logits_matrix.tensor, embedding_matrix.tensor, soft_matrix.tensor, 3,
                                        state);
    for (const Order order : orders()) {
        const Masses masses = run_find_mass(order, logits, kVocab, row::scale_of(0.8f), state.dropped_mass);
        std::vector<int32_t> first = {0}, dense;
        for (int32_t t = 0; t < 3; ++t) {
            const bool is_dense = masses.n_kept[t] > kMaxGathered;
            if (is_dense) dense.push_back(t);
            first.push_back(first.back() + (is_dense ? 0 : masses.n_kept[t]));
        }
        CHECK(dense == std::vector<int32_t>{1});
        std::vector<float> soft(3 * kEmbd);
        run_gather(order, masses, first, embedding, state.embedding_scale, soft);
        run_dense(order, logits, masses, dense, embedding, state.embedding_scale, soft);
        for (int64_t i = 0; i < 3 * kEmbd; ++i) {
            const float tolerance = i / kEmbd == 1 ? 1e-4f : 1e-5f;  // float16 probabilities of the dense row
            if (std::fabs(soft[i] - soft_matrix.data()[i]) > tolerance) FAIL_CHECK("at ", i);
        }
    }
}

}  // namespace testing
}  // namespace pydiffusion
