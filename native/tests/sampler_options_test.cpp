// The table of sampler options against the defaults of the reference implementation.
#include "sampler/sampler_options.h"

#include <set>

#include "sampler/registry.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

// Literals from transformers: DiffusionGemmaGenerationConfig._get_default_generation_params.
TEST_CASE("the entropy bound's defaults are the reference implementation's") {
    const SamplerTable& table = entropy_bound_table();
    const auto check = [&](const char* name, const char* key, bool integer, double value) {
        CAPTURE(name);
        const SamplerOption& option = table.option(name);
        CHECK(std::string(option.key) == key);
        CHECK(option.integer == integer);
        CHECK(option.reference_default == value);
    };
    CHECK(table.options.size() == 6);
    check("steps", "diffusion.eb_max_steps", true, 48);
    check("t_min", "diffusion.eb_t_min", false, 0.4);
    check("t_max", "diffusion.eb_t_max", false, 0.8);
    check("entropy_bound", "diffusion.eb_entropy_bound", false, 0.1);
    check("stability_threshold", "diffusion.eb_stability_threshold", true, 1);
    check("confidence_threshold", "diffusion.eb_confidence_threshold", false, 0.005);
    CHECK(table.reference_defaults().at("t_min") == double{0.4f});  // as a file would hold it
    CHECK_ERROR(table.option("temperature"), argument, "'temperature'");
}

TEST_CASE("every sampler's defaults are permitted, and its keys its own") {
    std::set<std::string> names, keys;
    for (const SamplerTable* table : sampler_tables()) {
        CAPTURE(table->name);
        CHECK(names.insert(table->name).second);
        if (table->conflict) CHECK_FALSE(table->conflict(table->reference_defaults()));
        for (const SamplerOption& option : table->options) {
            CAPTURE(option.name);
            CHECK(keys.insert(option.key).second);
            CHECK(option.reference_default >= option.low);
            CHECK(option.reference_default <= option.high);
        }
    }
}

TEST_CASE("temperatures that contradict each other") {
    const auto conflict = [](double t_min, double t_max) {
        SamplerValues values = entropy_bound_table().reference_defaults();
        values["t_min"] = t_min;
        values["t_max"] = t_max;
        return entropy_bound_table().conflict(values);
    };
    CHECK_FALSE(conflict(0.5, 0.5));
    REQUIRE(conflict(0.6, 0.5));
    CHECK(conflict(0.6, 0.5)->name == "t_max");
    CHECK(conflict(0.6, 0.5)->what == "is less than 'diffusion.eb_t_min'");
    CHECK(conflict(0.0, 0.0)->what == "is 0; it must be positive");
}

}  // namespace testing
}  // namespace pydiffusion
