// Samplers by name: the built-in one, one that a test adds, and names that are refused.
#include "sampler/entropy_bound.h"
#include "sampler/registry.h"
#include "support.h"
#include "toy/unmask_sampler.h"

namespace pydiffusion {
namespace testing {

namespace {

SamplerParams defaults() { return {entropy_bound_table().reference_defaults(), 0}; }

std::vector<std::string> names() {
    std::vector<std::string> all;
    for (const SamplerTable* table : sampler_tables()) all.emplace_back(table->name);
    return all;
}

}  // namespace

TEST_CASE("the built-in sampler") {
    const auto sampler = make_sampler("entropy-bound", defaults(), 64, -1);
    CHECK(dynamic_cast<EntropyBoundSampler*>(sampler.get()));
    SamplerParams params = defaults();
    params.values["entropy_bound"] = -1.0;
    CHECK_ERROR(make_sampler("entropy-bound", params, 64, -1), argument, "entropy_bound");
}

TEST_CASE("a name that is not registered is refused with those that are") {
    CHECK_ERROR(make_sampler("greedy\n", defaults(), 64, -1), unsupported, "'greedy\\x0a'");
    CHECK_ERROR(make_sampler("", defaults(), 64, -1), unsupported, "entropy-bound");
}

TEST_CASE("a sampler that is added has a name of its own") {
    CHECK(names() == std::vector<std::string>{"entropy-bound"});
    CHECK_ERROR(register_sampler(entropy_bound_table(), make_unmask), argument, "'entropy-bound'");
    CHECK(dynamic_cast<EntropyBoundSampler*>(make_sampler("entropy-bound", defaults(), 64, 9).get()));
    register_sampler(unmask_table(), make_unmask);
    CHECK(names() == std::vector<std::string>{"entropy-bound", "unmask"});
    CHECK(make_sampler("unmask", defaults(), 64, 9)->noise(0) == 9);
    CHECK(&sampler_table("unmask") == &unmask_table());
    CHECK_ERROR(register_sampler(unmask_table(), make_entropy_bound), argument, "'unmask'");
}

}  // namespace testing
}  // namespace pydiffusion
