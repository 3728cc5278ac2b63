#include "sampler/sampler_options.h"

#include "util/error.h"

namespace pydiffusion {

namespace {

constexpr double kMaxCount = 1 << 20;
constexpr double kMaxTemperature = 100.0;
constexpr double kMaxEntropy = 1e9;  // nats; more than any distribution has, so that a file can say "all"

std::optional<InvalidOption> temperature_conflict(const SamplerValues& values) {
    const double t_min = values.at("t_min"), t_max = values.at("t_max");
    if (t_max < t_min)
        return InvalidOption{"t_max", "is less than " + quoted(entropy_bound_table().option("t_min").key)};
    if (t_max <= 0.0) return InvalidOption{"t_max", "is 0; it must be positive"};
    return std::nullopt;
}

}  // namespace

const SamplerOption& SamplerTable::option(const std::string& wanted) const {
    for (const SamplerOption& option : options) {
        if (wanted == option.name) return option;
    }
    throw Error(ErrorKind::argument, "the sampler " + quoted(name) + " has no option " + quoted(wanted));
}

SamplerValues SamplerTable::reference_defaults() const {
    SamplerValues values;
    for (const SamplerOption& option : options) {
        const double value = option.reference_default;
        values[option.name] = option.integer ? value : static_cast<float>(value);
    }
    return values;
}

const SamplerTable& entropy_bound_table() {
    static const SamplerTable table = {
        "entropy-bound",
        {
            {"steps", "diffusion.eb_max_steps", true, 48, 1, kMaxCount},
            {"t_min", "diffusion.eb_t_min", false, 0.4, 0, kMaxTemperature},
            {"t_max", "diffusion.eb_t_max", false, 0.8, 0, kMaxTemperature},
            {"entropy_bound", "diffusion.eb_entropy_bound", false, 0.1, 0, kMaxEntropy},
            {"stability_threshold", "diffusion.eb_stability_threshold", true, 1, 0, kMaxCount},
            {"confidence_threshold", "diffusion.eb_confidence_threshold", false, 0.005, 0, kMaxEntropy},
        },
        temperature_conflict};
    return table;
}

}  // namespace pydiffusion
