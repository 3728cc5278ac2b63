// Bindings of adapters.
#include <nanobind/stl/string.h>

#include <functional>

#include "adapters/adapter.h"
#include "bindings/bindings.h"
#include "bindings/session_types.h"

namespace pydiffusion {

namespace {

using FloatArray = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;

Array array_of(const FloatArray& values) {
    Array array = {values.data(), {}};
    for (size_t i = 0; i < values.ndim(); ++i) array.shape.push_back(static_cast<int64_t>(values.shape(i)));
    return array;
}

// targets: (tensor, side, a, b), pulled one at a time.
std::shared_ptr<const Adapter> load_adapter(const PyModel& model, const nb::str& name,
                                            const nb::iterable& targets) {
    auto adapter = std::make_shared<Adapter>(model.model, from_str(name));
    for (const nb::handle target : targets) {
        nb::tuple fields;
        nb::str tensor_name, side_name;
        FloatArray a, b;
        if (!nb::try_cast(target, fields) || fields.size() != 4 || !nb::try_cast(fields[0], tensor_name) ||
            !nb::try_cast(fields[1], side_name) || !nb::try_cast(fields[2], a) || !nb::try_cast(fields[3], b))
            throw nb::type_error("a target must be (str, str, float32 array, float32 array)");
        const std::string tensor = from_str(tensor_name), side = from_str(side_name);
        check_signals();
        const WithoutGil release;
        adapter->add(tensor, side, array_of(a), array_of(b));
    }
    return adapter;
}

}  // namespace

void bind_adapters(nb::module_& m) {
    nb::class_<PyAdapter>(m, "Adapter",
                          "Low-rank changes of a model's matrices (LoRA); immutable, shared by sessions.")
        .def(
            "__init__",
            [](PyAdapter* self, const PyModel& model, const nb::str& name, const nb::iterable& targets) {
                new (self) PyAdapter{load_adapter(model, name, targets)};
            },
            nb::arg("model"), nb::arg("name"), nb::arg("targets"),
            "targets: (tensor, side, a, b) of each change b @ a, pulled one at a time: the matrix's name "
            "without '.weight'; 'encoder', 'decoder' or 'both'; a (rank, n_in) and b (n_out, rank) float32, "
            "of experts with their number first.")
        .def(
            "__eq__", [](const PyAdapter& a, const PyAdapter& b) { return a.adapter == b.adapter; },
            nb::is_operator(), nb::sig("def __eq__(self, other: object, /) -> bool"))
        .def("__hash__", [](const PyAdapter& a) { return std::hash<const void*>()(a.adapter.get()); })
        .def_prop_ro("name", [](const PyAdapter& a) { return to_str(a.adapter->name()); })
        .def_prop_ro(
            "n_bytes", [](const PyAdapter& a) { return a.adapter->n_bytes(); },
            "Bytes of its factors, on whatever device they are.")
        .def_prop_ro("n_targets", [](const PyAdapter& a) { return a.adapter->n_targets(); })
        .def_prop_ro(
            "rank", [](const PyAdapter& a) { return a.adapter->rank(); }, "The largest of its factors.")
        .def_prop_ro(
            "n_owners", [](const PyAdapter& a) { return a.adapter.use_count(); },
            "Objects like this one, and sessions, that keep its factors in memory.");
}

}  // namespace pydiffusion
