// The registry of samplers: one line each.
#include "sampler/registry.h"

#include <algorithm>

#include "sampler/entropy_bound.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

struct Registered {
    const SamplerTable* table;
    SamplerFactory make;
};

std::vector<Registered>& registered() {
    static std::vector<Registered> samplers = {
        {&entropy_bound_table(), make_entropy_bound},
    };
    return samplers;
}

const Registered* find(const std::string& name) {
    const std::vector<Registered>& all = registered();
    const auto found =
        std::find_if(all.begin(), all.end(), [&](const Registered& one) { return name == one.table->name; });
    return found == all.end() ? nullptr : &*found;
}

const Registered& require(const std::string& name) {
    if (const Registered* found = find(name)) return *found;
    std::string names;
    for (const Registered& known : registered())
        names += (names.empty() ? "" : ", ") + std::string(known.table->name);
    throw Error(ErrorKind::unsupported, "there is no sampler " + quoted(name) + "; this build has: " + names);
}

}  // namespace

std::unique_ptr<Sampler> make_sampler(const std::string& name, const SamplerParams& params, int32_t n_vocab,
                                      int32_t mask_token) {
    return require(name).make(params, n_vocab, mask_token);
}

const SamplerTable& sampler_table(const std::string& name) { return *require(name).table; }

std::vector<const SamplerTable*> sampler_tables() {
    std::vector<const SamplerTable*> tables;
    for (const Registered& one : registered()) tables.push_back(one.table);
    return tables;
}

void register_sampler(const SamplerTable& table, SamplerFactory factory) {
    if (find(table.name))
        throw Error(ErrorKind::argument, "a sampler " + quoted(table.name) + " is registered already");
    registered().push_back({&table, factory});
}

}  // namespace pydiffusion
