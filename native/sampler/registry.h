// Samplers by name.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "sampler/sampler.h"
#include "sampler/sampler_options.h"

namespace pydiffusion {

// mask_token: the model's, or -1 if it has none.
using SamplerFactory = std::unique_ptr<Sampler> (*)(const SamplerParams& params, int32_t n_vocab,
                                                    int32_t mask_token);

// Throws Error(argument) for invalid parameters, Error(unsupported) for a name that is not registered.
std::unique_ptr<Sampler> make_sampler(const std::string& name, const SamplerParams& params, int32_t n_vocab,
                                      int32_t mask_token);

// Options of the sampler of this name; throws Error(unsupported).
const SamplerTable& sampler_table(const std::string& name);
std::vector<const SamplerTable*> sampler_tables();  // of all

// Adds a sampler to the built-in ones, by the name of its table. Throws Error(argument) if the name is taken.
// Not thread-safe: call it before the first generation.
void register_sampler(const SamplerTable& table, SamplerFactory factory);

}  // namespace pydiffusion
