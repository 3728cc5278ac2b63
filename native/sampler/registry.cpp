#include "sampler/registry.h"

#include <map>

#include "sampler/entropy_bound.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

std::map<std::string, SamplerFactory>& registered() {
    static std::map<std::string, SamplerFactory> samplers = {
        {"entropy-bound", make_entropy_bound},
    };
    return samplers;
}

}  // namespace

std::unique_ptr<Sampler> make_sampler(const std::string& name, const SamplerParams& params, int32_t n_vocab,
                                      int32_t mask_token) {
    const auto found = registered().find(name);
    if (found == registered().end()) {
        std::string names;
        for (const std::string& known : sampler_names()) names += (names.empty() ? "" : ", ") + known;
        throw Error(ErrorKind::unsupported,
                    "there is no sampler " + quoted(name) + "; this build has: " + names);
    }
    return found->second(params, n_vocab, mask_token);
}

void register_sampler(const std::string& name, SamplerFactory factory) {
    if (!registered().emplace(name, factory).second)
        throw Error(ErrorKind::argument, "a sampler " + quoted(name) + " is registered already");
}

std::vector<std::string> sampler_names() {
    std::vector<std::string> names;
    for (const auto& [name, factory] : registered()) names.push_back(name);
    return names;
}

}  // namespace pydiffusion
