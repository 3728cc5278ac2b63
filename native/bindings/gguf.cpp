#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "bindings/bindings.h"
#include "gguf/gguf_file.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

nb::object to_python(const Value& value) {
    if (!value.is_array) {
        return std::visit(
            [](const auto& scalar) -> nb::object {
                using T = std::decay_t<decltype(scalar)>;
                if constexpr (std::is_same_v<T, std::string>) {
                    return to_str(scalar);
                } else {
                    return nb::cast(scalar);
                }
            },
            value.scalar);
    }
    nb::list list;
    for (const std::string& text : value.strings) list.append(to_str(text));
    for (const double number : value.floats) list.append(number);
    for (const int64_t number : value.integers) {
        if (value.type == ValueType::boolean) {
            list.append(number != 0);
        } else {
            list.append(number);
        }
    }
    return list;
}

nb::tuple numpy_shape(const TensorInfo& tensor) {
    nb::list shape;
    for (auto d = tensor.ne.rbegin(); d != tensor.ne.rend(); ++d) shape.append(*d);
    return nb::tuple(shape);
}

}  // namespace

void bind_file(nb::module_& m) {
    nb::class_<TensorInfo>(m, "TensorInfo", "A tensor's name, type, shape and location in a GGUF file.")
        .def_prop_ro("name", [](const TensorInfo& t) { return to_str(t.name); })
        .def_prop_ro("type", [](const TensorInfo& t) { return upper_type_name(t.type); })
        .def_prop_ro("shape", numpy_shape, "Dimensions in numpy order, slowest first.")
        .def_ro("offset", &TensorInfo::offset, "Bytes from the start of the file (of its part if split).")
        .def_ro("n_bytes", &TensorInfo::n_bytes)
        .def_ro("part", &TensorInfo::part, "0-based part of a split file.")
        .def("__repr__", [](const TensorInfo& t) {
            return format("TensorInfo(%s, %s, ne=%s)", quoted(t.name).c_str(),
                          upper_type_name(t.type).c_str(), t.shape().c_str());
        });

    nb::class_<GgufFile>(m, "GgufFile",
                         "A GGUF file of any architecture, memory-mapped and validated.\n\n"
                         "Raises ModelFormatError, naming the key or tensor, if the file is not valid GGUF.")
        .def(
            "__init__",
            [](GgufFile* self, const nb::str& path) {
                const std::string name = from_str(path);
                const WithoutGil release;
                new (self) GgufFile(name);
            },
            nb::arg("path"))
        .def_static(
            "open_all_parts",
            [](const nb::str& path) {
                const std::string name = from_str(path);
                const WithoutGil release;
                return GgufFile::open_all_parts(name);
            },
            nb::arg("path"), "Open a file, or all parts of a split file, given its first part, as one.")
        .def_prop_ro("path", [](const GgufFile& f) { return to_str(f.path()); })
        .def_prop_ro(
            "paths",
            [](const GgufFile& f) {
                nb::list paths;
                for (size_t i = 0; i < f.n_parts(); ++i) paths.append(to_str(f.part(i).path()));
                return paths;
            },
            "Paths of all parts; one path if the file is not split.")
        .def_prop_ro("version", &GgufFile::version)
        .def_prop_ro("alignment", &GgufFile::alignment)
        .def_prop_ro("data_offset", &GgufFile::data_offset)
        .def_prop_ro("n_bytes", &GgufFile::n_bytes_of_all_parts)
        .def_prop_ro(
            "metadata",
            [](const GgufFile& f) {
                nb::dict metadata;
                for (const std::string& key : f.keys()) metadata[to_str(key)] = to_python(*f.find(key));
                return metadata;
            },
            "Keys and values in file order; a new dict at each access.")
        .def_prop_ro(
            "other_kind", [](const GgufFile& f) { return to_str(f.other_kind()); },
            "The kind of a GGUF without a model, and what to do with it; empty for a model.")
        .def_prop_ro("metadata_types",
                     [](const GgufFile& f) {
                         nb::dict types;
                         for (const std::string& key : f.keys())
                             types[to_str(key)] = f.find(key)->type_name();
                         return types;
                     })
        .def_prop_ro("tensors",
                     [](nb::handle self) {
                         nb::list tensors;
                         for (const TensorInfo& t : nb::cast<const GgufFile&>(self).tensors()) {
                             tensors.append(nb::cast(t, nb::rv_policy::copy));
                         }
                         return tensors;
                     })
        .def(
            "tensor_bytes",
            [](nb::handle self, const nb::str& name) {
                const GgufFile& file = nb::cast<const GgufFile&>(self);
                const TensorInfo* tensor = file.find_tensor(from_str(name));
                if (!tensor)
                    throw Error(ErrorKind::argument,
                                file.path() + ": has no tensor " + quoted(from_str(name)));
                return nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(
                    file.tensor_data(*tensor), {static_cast<size_t>(tensor->n_bytes)}, self);
            },
            nb::arg("name"),
            "The tensor's bytes as a read-only view of the mapping, shape (n_bytes,), uint8.");
}

}  // namespace pydiffusion
