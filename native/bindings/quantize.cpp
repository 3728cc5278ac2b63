// Bindings of quantization and dequantization of rows.
#include "quantization/quantize.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cctype>

#include "bindings/bindings.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

std::string upper(std::string name) {
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::toupper(c); });
    return name;
}

}  // namespace

std::string upper_type_name(ggml_type type) { return upper(ggml_type_name(type)); }

ggml_type type_by_name(const std::string& name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const auto type = static_cast<ggml_type>(i);
        if (ggml_blck_size(type) > 0 && upper_type_name(type) == upper(name)) return type;
    }
    throw Error(ErrorKind::argument, quoted(name) + " is not a tensor type");
}

namespace {

nb::dict tensor_types() {
    nb::dict types;
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const auto type = static_cast<ggml_type>(i);
        if (ggml_blck_size(type) == 0) continue;
        types[upper_type_name(type).c_str()] = nb::make_tuple(i, ggml_blck_size(type), ggml_type_size(type));
    }
    return types;
}

// Checks that rows of `width` bytes hold n_per_row weights of the type.
void require_row_bytes(ggml_type type, size_t width, int64_t n_per_row) {
    const int64_t block = ggml_blck_size(type);
    // Blocks have at least 1 byte, so the third test prevents overflow in the fourth.
    if (n_per_row < 1 || n_per_row % block != 0 || static_cast<size_t>(n_per_row / block) > width ||
        ggml_type_size(type) * (n_per_row / block) != width) {
        throw Error(ErrorKind::argument,
                    format("rows of %zu bytes do not hold %lld weights of type %s", width,
                           static_cast<long long>(n_per_row), ggml_type_name(type)));
    }
}

void require_importance(const std::optional<Array1<float>>& importance, size_t n_per_row) {
    if (importance && importance->shape(0) != n_per_row) {
        throw Error(ErrorKind::argument, format("importance has %zu entries for rows of %zu weights",
                                                importance->shape(0), n_per_row));
    }
}

// Bytes of a row; 0 if n_per_row is not a multiple of the block size, which the conversion then refuses.
size_t row_bytes(ggml_type type, size_t n_per_row) {
    return n_per_row % ggml_blck_size(type) == 0 ? ggml_row_size(type, n_per_row) : 0;
}

Numpy2<uint8_t> quantize(const Array2<float>& rows, const std::string& type_name, int n_threads,
                         std::optional<Array1<float>> importance) {
    const ggml_type type = type_by_name(type_name);
    const size_t n_rows = rows.shape(0), n_per_row = rows.shape(1);
    require_importance(importance, n_per_row);
    if (n_threads < 1) throw Error(ErrorKind::argument, "n_threads must be at least 1");
    const size_t width = row_bytes(type, n_per_row);
    const auto out = new_numpy<uint8_t>(n_rows, width);
    {
        const WithoutGil release;
        quantize_rows(type, rows.data(), n_rows, n_per_row, importance ? importance->data() : nullptr,
                      n_threads, out.data());
    }
    return out;
}

Numpy2<float> dequantize(const Array2<uint8_t>& data, const std::string& type_name, int64_t n_per_row) {
    const ggml_type type = type_by_name(type_name);
    const size_t n_rows = data.shape(0);
    require_row_bytes(type, data.shape(1), n_per_row);
    const auto out = new_numpy<float>(n_rows, n_per_row);
    {
        const WithoutGil release;
        dequantize_rows(type, data.data(), n_rows, n_per_row, out.data());
    }
    return out;
}

std::tuple<Numpy2<uint8_t>, int64_t> convert(const Array2<uint8_t>& data, const std::string& source_name,
                                             const std::string& target_name, int64_t n_per_row,
                                             std::optional<Array1<float>> importance, bool keeps_nonfinite) {
    const ggml_type source = type_by_name(source_name), target = type_by_name(target_name);
    require_row_bytes(source, data.shape(1), n_per_row);
    require_importance(importance, n_per_row);
    const size_t n_rows = data.shape(0), width = row_bytes(target, n_per_row);
    const auto out = new_numpy<uint8_t>(n_rows, width);
    int64_t nonfinite;
    {
        const WithoutGil release;
        nonfinite = convert_rows(source, data.data(), target, n_rows, n_per_row,
                                 importance ? importance->data() : nullptr, keeps_nonfinite, out.data());
    }
    return {out, nonfinite};
}

int64_t nonfinite_weight(const Array2<uint8_t>& data, const std::string& type_name, int64_t n_per_row) {
    const ggml_type type = type_by_name(type_name);
    require_row_bytes(type, data.shape(1), n_per_row);
    const WithoutGil release;
    return find_nonfinite(type, data.data(), data.shape(0), n_per_row);
}

std::tuple<Numpy1<double>, Numpy1<double>> errors_of_rows(const Array2<uint8_t>& data,
                                                          const std::string& type_name,
                                                          const Array2<float>& rows) {
    const ggml_type type = type_by_name(type_name);
    const size_t n_rows = data.shape(0);
    require_row_bytes(type, data.shape(1), rows.shape(1));
    if (rows.shape(0) != n_rows) {
        throw Error(ErrorKind::argument,
                    format("data has %zu rows, but rows has %zu", n_rows, rows.shape(0)));
    }
    std::vector<double> squares(n_rows), errors(n_rows);
    {
        const WithoutGil release;
        row_errors(type, data.data(), rows.data(), n_rows, rows.shape(1), squares.data(), errors.data());
    }
    return {to_numpy(std::move(squares)), to_numpy(std::move(errors))};
}

}  // namespace

void bind_quantize(nb::module_& m) {
    m.def("tensor_types", tensor_types, "Type name -> (number in ggml, weights per block, bytes per block).");
    m.def("quantize_rows", quantize, nb::arg("rows").noconvert(), nb::arg("type"), nb::arg("n_threads") = 1,
          nb::arg("importance").noconvert().none() = nb::none(),
          "Quantize rows (n_rows, n_per_row) float32 -> blocks (n_rows, bytes_per_row) uint8.");
    m.def("dequantize_rows", dequantize, nb::arg("data").noconvert(), nb::arg("type"), nb::arg("n_per_row"),
          "Dequantize blocks (n_rows, bytes_per_row) uint8 -> rows (n_rows, n_per_row) float32.");
    m.def("convert_rows", convert, nb::arg("data").noconvert(), nb::arg("source"), nb::arg("target"),
          nb::arg("n_per_row"), nb::arg("importance").noconvert().none() = nb::none(),
          nb::arg("keeps_nonfinite") = false,
          "Convert blocks (n_rows, bytes_per_row) uint8 to another type on the calling thread. Returns them "
          "and "
          "-1, or the index of the first non-finite weight; rows from its chunk on are then undefined.");
    m.def("find_nonfinite", nonfinite_weight, nb::arg("data").noconvert(), nb::arg("type"),
          nb::arg("n_per_row"), "Index of the first non-finite weight, or -1.");
    m.def(
        "row_errors", errors_of_rows, nb::arg("data").noconvert(), nb::arg("type"),
        nb::arg("rows").noconvert(),
        "Per row, the sum of squares of `rows` (n_rows, n_per_row) float32 and the sum of squared errors of "
        "the quantized `data`: two arrays (n_rows,) float64.");
}

}  // namespace pydiffusion
