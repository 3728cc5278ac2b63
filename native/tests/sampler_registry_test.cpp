// Samplers by name: the built-in one, one that a test adds, and names that are refused.
#include "sampler/entropy_bound.h"
#include "sampler/registry.h"
#include "support.h"
#include "toy/unmask_sampler.h"

namespace pydiffusion {
namespace testing {

TEST_CASE("the built-in sampler") {
    const auto sampler = make_sampler("entropy-bound", SamplerParams(), 64, -1);
    CHECK(dynamic_cast<EntropyBoundSampler*>(sampler.get()));
    SamplerParams params;
    params.entropy_bound = -1.0f;
    CHECK_ERROR(make_sampler("entropy-bound", params, 64, -1), argument, "entropy_bound");
}

TEST_CASE("a name that is not registered is refused with those that are") {
    CHECK_ERROR(make_sampler("greedy\n", SamplerParams(), 64, -1), unsupported, "'greedy\\x0a'");
    CHECK_ERROR(make_sampler("", SamplerParams(), 64, -1), unsupported, "entropy-bound");
}

TEST_CASE("a sampler that is added has a name of its own") {
    const std::vector<std::string> before = sampler_names();
    CHECK(before == std::vector<std::string>{"entropy-bound"});
    CHECK_ERROR(register_sampler("entropy-bound", make_unmask), argument, "'entropy-bound'");
    CHECK(dynamic_cast<EntropyBoundSampler*>(make_sampler("entropy-bound", SamplerParams(), 64, 9).get()));
    register_sampler("unmask", make_unmask);
    CHECK(sampler_names() == std::vector<std::string>{"entropy-bound", "unmask"});
    CHECK(make_sampler("unmask", SamplerParams(), 64, 9)->noise(0) == 9);
    CHECK_ERROR(register_sampler("unmask", make_entropy_bound), argument, "'unmask'");
}

}  // namespace testing
}  // namespace pydiffusion
