// Bindings of the sampler's functions on numpy arrays.
#include <nanobind/stl/tuple.h>

#include "bindings/bindings.h"
#include "model/architecture.h"
#include "sampler/entropy_bound.h"
#include "sampler/logits.h"
#include "sampler/philox.h"
#include "sampler/registry.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

std::tuple<Numpy1<int32_t>, Numpy1<float>, Numpy1<int32_t>> measure(const Array2<float>& logits,
                                                                    float temperature,
                                                                    const Array1<float>& u) {
    const size_t n = logits.shape(0), n_vocab = logits.shape(1);
    if (u.shape(0) != n)
        throw Error(ErrorKind::argument, format("u has %zu entries for %zu rows", u.shape(0), n));
    if (n_vocab == 0) throw Error(ErrorKind::argument, "logits has 0 columns; expected (n, n_vocab)");
    if (!(temperature > 0.0f)) throw Error(ErrorKind::argument, "temperature must be positive");
    for (size_t i = 0; i < n; ++i) {
        if (!(u.data()[i] >= 0.0f && u.data()[i] < 1.0f))
            throw Error(ErrorKind::argument, "u must be in [0, 1)");
    }
    std::vector<int32_t> argmax(n), sampled(n);
    std::vector<float> entropy(n);
    for (size_t i = 0; i < n; ++i) {
        const Measure m = measure_row(logits.data() + i * n_vocab, n_vocab, temperature, u.data()[i]);
        argmax[i] = m.argmax;
        sampled[i] = m.sampled;
        entropy[i] = m.entropy;
    }
    return {to_numpy(std::move(argmax)), to_numpy(std::move(entropy)), to_numpy(std::move(sampled))};
}

Numpy1<bool> accept_mask(const Array1<float>& entropy, float bound) {
    if (!(bound >= 0.0f))
        throw Error(ErrorKind::argument, format("bound is %g; it must be at least 0", bound));
    return to_bools(accept(entropy.data(), entropy.shape(0), bound));
}

std::tuple<Numpy1<float>, Numpy1<int32_t>> random_draws(uint64_t seed, uint32_t canvas_index, uint32_t step,
                                                        uint32_t n, int32_t n_vocab) {
    if (n_vocab < 1) throw Error(ErrorKind::argument, "n_vocab must be at least 1");
    std::vector<float> u(n);
    std::vector<int32_t> tokens(n);
    for (uint32_t i = 0; i < n; ++i) {
        const Draw draw = random_draw(seed, canvas_index, step, i, n_vocab);
        u[i] = draw.u;
        tokens[i] = draw.token;
    }
    return {to_numpy(std::move(u)), to_numpy(std::move(tokens))};
}

// The name of the sampler, by the name of the architecture.
nb::dict samplers_of_architectures() {
    nb::dict samplers;
    for (const std::string& name : architecture_names())
        samplers[name.c_str()] = find_architecture(name)->sampler();
    return samplers;
}

// One dict per option, by the name of the sampler.
nb::dict sampler_options() {
    nb::dict samplers;
    for (const SamplerTable* table : sampler_tables()) {
        nb::list options;
        for (const SamplerOption& option : table->options) {
            nb::dict d;
            d["name"] = option.name;
            d["key"] = option.key;
            d["integer"] = option.integer;
            d["default"] = option_value(option, option.reference_default);
            d["low"] = option_value(option, option.low);
            d["high"] = option_value(option, option.high);
            options.append(d);
        }
        samplers[table->name] = options;
    }
    return samplers;
}

}  // namespace

nb::object option_value(const SamplerOption& option, double value) {
    if (option.integer) return nb::int_(static_cast<int64_t>(value));
    return nb::float_(value);
}

void bind_sampler(nb::module_& m) {
    m.attr("CANVAS_LENGTH_KEY") = kCanvasLengthKey;
    m.def("samplers_of_architectures", samplers_of_architectures,
          "Name of the architecture -> name of its models' sampler.");
    m.def(
        "sampler_options", sampler_options,
        "Options of each sampler that a file can set: by sampler, dicts of name, key, integer, default, low, "
        "high.");
    m.def("step_temperature", step_temperature, nb::arg("step"), nb::arg("steps"), nb::arg("t_min"),
          nb::arg("t_max"));
    m.def("measure", measure, nb::arg("logits").noconvert(), nb::arg("temperature"),
          nb::arg("u").noconvert());
    m.def("accept", accept_mask, nb::arg("entropy").noconvert(), nb::arg("bound"));
    m.def("random_draws", random_draws, nb::arg("seed"), nb::arg("canvas_index"), nb::arg("step"),
          nb::arg("n"), nb::arg("n_vocab"));
}

}  // namespace pydiffusion
