// Every barrier and mask of the step kernels, mutated in turn: the runs below must notice, by an error (a
// deadlock, lanes that don't arrive, a race), a crash or other results. None survives.
#include "backend/step_backend.h"
#include "matrix.h"
#include "step_kernels_runs.h"

namespace pydiffusion {
namespace testing {

namespace {

using emulation::Fault;
using emulation::Mutation;

// Of lists that leave warps without an entry, and with one more than others.
std::vector<float> soft_embeddings(Order order) {
    constexpr int64_t d = 264, n_vocab = 50;
    std::vector<cuda::Bfloat16> embedding;
    for (const float x : random_values(n_vocab * d, 2)) embedding.push_back(cuda::bfloat16_of(x));
    const std::vector<int32_t> n_kept = {5, 300};
    const std::vector<float> weights = random_values(2 * kMaxGathered, 3);
    std::vector<int32_t> tokens(weights.size());
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 7 % n_vocab);
    std::vector<float> soft(2 * d);
    emulate({2, 2}, kGatherWarps * kLanes, 0, order, [&] {
        sum_embeddings(soft.data(), embedding.data(), d, d, n_kept.data(), tokens.data(), weights.data(),
                       3.0f);
    });
    return soft;
}

// Outputs of the kernels that have barriers or masks, as bytes.
std::string results(Order order) {
    constexpr int64_t n_vocab = 1100;
    const std::vector<float> logits = random_values(2 * n_vocab, 1, 4.0f);
    std::string bytes;
    const auto append = [&](const auto& values) {
        bytes.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof values[0]);
    };
    append(run_measure(order, logits, n_vocab, 0.7f, {0.3f, 0.9f}).measures);
    const Masses masses = run_find_mass(order, logits, n_vocab, 1.25f, 1e-3f);
    append(masses.distributions);
    append(masses.n_kept);
    append(masses.tokens);
    append(masses.weights);
    append(soft_embeddings(order));
    return bytes;
}

}  // namespace

TEST_CASE("every barrier and every mask of the step kernels is needed") {
    const std::string expected = results(Order::forward);
    for (const Order order : kOrders) CHECK(results(order) == expected);
    const std::vector<Mutation> mutations = emulation::mutations_of([] { results(Order::forward); });
    int n_barriers = 0;
    for (const Mutation& mutation : mutations) {
        CAPTURE(mutation.text());
        if (mutation.fault == Fault::no_barrier) ++n_barriers;
        if (kDetectsRaces && mutation.fault != Fault::no_barrier) continue;  // no race, and a fork takes long
        CHECK_FALSE(emulation::survives(mutation, [&] {
            return std::all_of(std::begin(kOrders), std::end(kOrders),
                               [&](Order order) { return results(order) == expected; });
        }));
    }
    CHECK(n_barriers == 6);
    CHECK(mutations.size() == 21);
}

}  // namespace testing
}  // namespace pydiffusion
