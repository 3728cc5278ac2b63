// Options that a file can give defaults for, of each sampler: names, metadata keys, reference defaults,
// ranges. The only place of these numbers: the bindings hand the table to Python.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace pydiffusion {

// Length of the canvas on which the model was trained; not a sampler's, as every sampler has a canvas.
inline constexpr char kCanvasLengthKey[] = "diffusion.canvas_length";
// Token with which a canvas begins, of models that unmask.
inline constexpr char kMaskTokenKey[] = "diffusion.mask_token_id";

struct SamplerOption {
    const char* name;          // as in SamplerParams
    const char* key;           // of the file's default
    bool integer;              // otherwise a float
    double reference_default;  // where the file has no such key
    double low, high;          // permitted in a file, inclusive
};

// Values by the name of the option. Floats are rounded to float32, which files store.
using SamplerValues = std::map<std::string, double>;

struct InvalidOption {
    std::string name, what;
};

// Of every sampler, one option is "steps".
struct SamplerTable {
    const char* name;
    std::vector<SamplerOption> options;
    // What is wrong with values that are in range each, but not together; may be null.
    std::optional<InvalidOption> (*conflict)(const SamplerValues& values);

    // Throws Error(argument) if there is no such option.
    const SamplerOption& option(const std::string& name) const;
    SamplerValues reference_defaults() const;
};

// The entropy-bound sampler, with the defaults of DiffusionGemma's reference implementation.
const SamplerTable& entropy_bound_table();

}  // namespace pydiffusion
