// A device's sampler and self-conditioning, as the host computes them warp by warp, against the CPU's own.
#include "backend/step_backend.h"

#include <cmath>
#include <limits>

#include "backend/cpu/thread_pool.h"
#include "backend/devices.h"
#include "backend/fake_device.h"
#include "ggml-cpu.h"
#include "matrix.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

constexpr int64_t kVocab = 3000, kTokens = 5;

}  // namespace

TEST_CASE("measures are those of the CPU's sampler") {
    const std::vector<float> values = random_values(kVocab * kTokens, 1, 12.0f);
    const Matrix logits(kVocab, kTokens, values);
    logits.data()[2 * kVocab + 77] = std::numeric_limits<float>::quiet_NaN();
    StepState state;
    state.temperature = 0.7f;
    state.u = {0.0f, 0.25f, 0.5f, 0.75f, 0.999f};
    state.measures.resize(kTokens);
    make_host_step_backend()->measure(logits.tensor, kTokens, state);
    for (int64_t t = 0; t < kTokens; ++t) {
        CAPTURE(t);
        const Measure& found = state.measures[t];
        if (t == 2) {
            CHECK(std::isnan(found.entropy));
            continue;
        }
        std::vector<float> row(values.begin() + t * kVocab, values.begin() + (t + 1) * kVocab);
        const Measure expected = cap_and_measure_row(row.data(), kVocab, 30.0f, 0.7f, state.u[t]);
        CHECK(found.argmax == expected.argmax);
        CHECK(found.sampled == expected.sampled);
        CHECK(found.entropy == doctest::Approx(expected.entropy).epsilon(1e-4));
        double furthest = 0.0;
        for (int64_t v = 0; v < kVocab; ++v)
            furthest = std::max(furthest, std::fabs(double{row[v]} - logits.data()[t * kVocab + v]));
        CHECK(furthest < 1e-5);
    }
}

TEST_CASE("of equal maxima the first, whichever thread and warp finds it") {
    for (const int64_t first : {1, 33, 95, 1500}) {
        for (const int64_t second : {32, 64, 96, 2976}) {  // of the first thread
            CAPTURE(first);
            CAPTURE(second);
            const Matrix logits(kVocab, 1, random_values(kVocab, 5));
            logits.data()[first] = logits.data()[second] = 20.0f;
            StepState state;
            state.u = {0.5f};
            state.measures.resize(1);
            make_host_step_backend()->measure(logits.tensor, 1, state);
            CHECK(state.measures[0].argmax == std::min(first, second));
        }
    }
}

TEST_CASE("the soft embedding is the mean of embeddings") {
    constexpr int64_t n_embd = 8;
    const std::vector<float> values = random_values(kVocab * 2, 2, 3.0f);
    const std::vector<float> rows = random_values(kVocab * n_embd, 3);
    const Matrix logits(kVocab, 2, values), embedding(n_embd, kVocab, rows);
    const Matrix soft(n_embd, 2, std::vector<float>(2 * n_embd, 9.0f));
    StepState state;
    state.embedding_scale = 2.0f;
    state.previous_temperature = 0.5f;
    const auto backend = make_host_step_backend();
    backend->condition(logits.tensor, embedding.tensor, soft.tensor, 2, state);
    for (int i = 0; i < 2 * n_embd; ++i) CHECK(soft.data()[i] == 0.0f);  // no self-conditioning
    state.self_conditioning = true;
    backend->condition(logits.tensor, embedding.tensor, soft.tensor, 2, state);
    for (int64_t t = 0; t < 2; ++t) {
        std::vector<float> p(values.begin() + t * kVocab, values.begin() + (t + 1) * kVocab);
        softmax_row(p.data(), kVocab, 0.5f);
        for (int64_t i = 0; i < n_embd; ++i) {
            double sum = 0.0;
            for (int64_t v = 0; v < kVocab; ++v) sum += double{p[v]} * rows[v * n_embd + i];
            CHECK(soft.data()[t * n_embd + i] == doctest::Approx(2.0 * sum).epsilon(1e-4));
        }
    }
}

TEST_CASE("a pinned position has one token") {
    const Matrix logits(kVocab, kTokens, random_values(kVocab * kTokens, 4));
    const std::vector<float> before(logits.data(), logits.data() + kVocab * kTokens);
    make_host_step_backend()->pin(logits.tensor, 3, 42, 5.0f, {});
    for (int64_t i = 0; i < kVocab * kTokens; ++i) {
        const bool pinned = i / kVocab == 3;
        const float expected = !pinned            ? before[i]
                               : i % kVocab == 42 ? 5.0f
                                                  : -std::numeric_limits<float>::infinity();
        if (logits.data()[i] != expected) FAIL_CHECK("at ", i);
    }
}

TEST_CASE("a device has the implementation that is registered for its ggml backend, or none") {
    ThreadPool pool(1);
    const ggml_backend_ptr fake = make_fake_device(1, pool.for_ggml()), cpu(ggml_backend_cpu_init());
    CHECK(has_step_backend(ggml_backend_get_device(fake.get())));
    CHECK(make_step_backend(fake.get()) != nullptr);

    CHECK_FALSE(has_step_backend(ggml_backend_get_device(cpu.get())));
    CHECK(make_step_backend(cpu.get()) == nullptr);
    register_step_backend("CPU", make_host_step_backend);
    CHECK(make_step_backend(cpu.get()) != nullptr);
    CHECK_ERROR(register_step_backend("CPU", make_host_step_backend), argument, "'CPU'");
    // Only GPUs are offered as devices all the same.
    CHECK(find_gpu("CPU") == nullptr);
}

}  // namespace testing
}  // namespace pydiffusion
