// Functions without a model: versions, quantization, the sampler.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cctype>
#include <thread>

#include "backend/cpu/amx/weighted_sums.h"
#include "bench/matmul_once.h"
#include "bench/roofline.h"
#include "bindings/bindings.h"
#include "ggml-cpu.h"
#include "quant/quantize.h"
#include "sampler/entropy_bound.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

std::string upper(std::string name) {
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::toupper(c); });
    return name;
}

}  // namespace

ggml_type type_by_name(const std::string& name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const auto type = static_cast<ggml_type>(i);
        if (ggml_blck_size(type) > 0 && upper(ggml_type_name(type)) == upper(name)) return type;
    }
    throw Error(ErrorKind::argument, quoted(name) + " is no tensor type");
}

namespace {

nb::dict tensor_types() {
    nb::dict types;
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const auto type = static_cast<ggml_type>(i);
        if (ggml_blck_size(type) == 0) continue;
        types[upper(ggml_type_name(type)).c_str()] =
            nb::make_tuple(i, ggml_blck_size(type), ggml_type_size(type));
    }
    return types;
}

// Of a type; `width` is that of a row of uint8.
void require_row_bytes(ggml_type type, size_t width, int64_t n_per_row) {
    const int64_t block = ggml_blck_size(type);
    // A block has a byte or more: what passes the third test can't overflow in the fourth.
    if (n_per_row < 1 || n_per_row % block != 0 || static_cast<size_t>(n_per_row / block) > width ||
        ggml_type_size(type) * (n_per_row / block) != width) {
        throw Error(ErrorKind::argument,
                    format("rows of %zu bytes are no rows of %lld weights of type %s", width,
                           static_cast<long long>(n_per_row), ggml_type_name(type)));
    }
}

void require_importance(const std::optional<Array1<float>>& importance, size_t n_per_row) {
    if (importance && importance->shape(0) != n_per_row) {
        throw Error(ErrorKind::argument,
                    format("importance has %zu entries for rows of %zu", importance->shape(0), n_per_row));
    }
}

// Of a row that the type may not divide, which whoever fills the array refuses.
size_t row_bytes(ggml_type type, size_t n_per_row) {
    return n_per_row % ggml_blck_size(type) == 0 ? ggml_row_size(type, n_per_row) : 0;
}

nb::object quantize(const Array2<float>& rows, const std::string& type_name, int n_threads,
                    std::optional<Array1<float>> importance) {
    const ggml_type type = type_by_name(type_name);
    const size_t n_rows = rows.shape(0), n_per_row = rows.shape(1);
    require_importance(importance, n_per_row);
    if (n_threads <= 0) n_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    const size_t width = row_bytes(type, n_per_row);
    auto* out = new uint8_t[std::max<size_t>(1, n_rows * width)];
    nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
    {
        const WithoutGil release;
        quantize_rows(type, rows.data(), n_rows, n_per_row, importance ? importance->data() : nullptr,
                      n_threads, out);
    }
    return nb::cast(nb::ndarray<nb::numpy, uint8_t>(out, {n_rows, width}, owner));
}

nb::object dequantize(const Array2<uint8_t>& data, const std::string& type_name, int64_t n_per_row) {
    const ggml_type type = type_by_name(type_name);
    const size_t n_rows = data.shape(0);
    require_row_bytes(type, data.shape(1), n_per_row);
    auto* out = new float[std::max<size_t>(1, n_rows * n_per_row)];
    nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    {
        const WithoutGil release;
        dequantize_rows(type, data.data(), n_rows, n_per_row, out);
    }
    return nb::cast(nb::ndarray<nb::numpy, float>(out, {n_rows, static_cast<size_t>(n_per_row)}, owner));
}

nb::tuple convert(const Array2<uint8_t>& data, const std::string& source_name, const std::string& target_name,
                  int64_t n_per_row, std::optional<Array1<float>> importance, bool keeps_nonfinite) {
    const ggml_type source = type_by_name(source_name), target = type_by_name(target_name);
    require_row_bytes(source, data.shape(1), n_per_row);
    require_importance(importance, n_per_row);
    const size_t n_rows = data.shape(0), width = row_bytes(target, n_per_row);
    auto* out = new uint8_t[std::max<size_t>(1, n_rows * width)];
    nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
    int64_t nonfinite;
    {
        const WithoutGil release;
        nonfinite = convert_rows(source, data.data(), target, n_rows, n_per_row,
                                 importance ? importance->data() : nullptr, keeps_nonfinite, out);
    }
    return nb::make_tuple(nb::ndarray<nb::numpy, uint8_t>(out, {n_rows, width}, owner), nonfinite);
}

int64_t nonfinite_weight(const Array2<uint8_t>& data, const std::string& type_name, int64_t n_per_row) {
    const ggml_type type = type_by_name(type_name);
    require_row_bytes(type, data.shape(1), n_per_row);
    const WithoutGil release;
    return find_nonfinite(type, data.data(), data.shape(0), n_per_row);
}

nb::tuple errors_of_rows(const Array2<uint8_t>& data, const std::string& type_name,
                         const Array2<float>& rows) {
    const ggml_type type = type_by_name(type_name);
    const size_t n_rows = data.shape(0);
    require_row_bytes(type, data.shape(1), rows.shape(1));
    if (rows.shape(0) != n_rows) {
        throw Error(ErrorKind::argument,
                    format("%zu rows can't be compared with %zu", n_rows, rows.shape(0)));
    }
    std::vector<double> squares(n_rows), errors(n_rows);
    {
        const WithoutGil release;
        row_errors(type, data.data(), rows.data(), n_rows, rows.shape(1), squares.data(), errors.data());
    }
    return nb::make_tuple(to_numpy(squares), to_numpy(errors));
}

nb::tuple measure(const Array2<float>& logits, float temperature, const Array1<float>& u) {
    const size_t n = logits.shape(0), n_vocab = logits.shape(1);
    if (u.shape(0) != n)
        throw Error(ErrorKind::argument, format("u has %zu entries for %zu rows", u.shape(0), n));
    if (n_vocab == 0) throw Error(ErrorKind::argument, "logits has no columns");
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
    return nb::make_tuple(to_numpy(argmax), to_numpy(entropy), to_numpy(sampled));
}

nb::object accept_mask(const Array1<float>& entropy, float bound) {
    if (!(bound >= 0.0f))
        throw Error(ErrorKind::argument, format("bound is %g; it must be at least 0", bound));
    const std::vector<uint8_t> accepted = accept(entropy.data(), entropy.shape(0), bound);
    bool* copy = new bool[accepted.size() + 1];
    std::copy(accepted.begin(), accepted.end(), copy);
    nb::capsule owner(copy, [](void* p) noexcept { delete[] static_cast<bool*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, bool>(copy, {accepted.size()}, owner));
}

nb::tuple random_draws(uint64_t seed, uint32_t canvas_index, uint32_t step, uint32_t n, int32_t n_vocab) {
    if (n_vocab < 1) throw Error(ErrorKind::argument, "n_vocab must be at least 1");
    std::vector<float> u(n);
    std::vector<int32_t> tokens(n);
    for (uint32_t i = 0; i < n; ++i) {
        const Draw draw = random_draw(seed, canvas_index, step, i, n_vocab);
        u[i] = draw.u;
        tokens[i] = draw.token;
    }
    return nb::make_tuple(to_numpy(u), to_numpy(tokens));
}

// x (n, n_inner) times rows of weights (n_rows, bytes) of a type -> (n, n_rows); with experts, I32 (n,
// n_used), the rows are so many matrices one after the other, and the result is (n, n_used * n_rows of one).
nb::object multiply(const std::string& kernels, const Array2<uint8_t>& rows, const std::string& type_name,
                    const Array2<float>& x, const std::optional<Array2<int32_t>>& experts, int64_t n_experts,
                    int n_threads) {
    const ggml_type type = type_by_name(type_name);
    matrix::Multiplication task;
    task.kernels = kernels;
    task.n_threads = n_threads;
    task.type = type;
    task.n_inner = static_cast<int64_t>(x.shape(1));
    task.n_rows = static_cast<int64_t>(rows.shape(0));
    task.n_columns = static_cast<int64_t>(x.shape(0));
    if (task.n_inner < 1 || task.n_inner % ggml_blck_size(type) != 0 ||
        ggml_row_size(type, task.n_inner) != rows.shape(1))
        throw Error(ErrorKind::argument, "x and the rows don't have the same number of weights");
    if (n_experts < 1 || n_threads < 1 || task.n_rows < 1 || task.n_columns < 1 ||
        task.n_rows % n_experts != 0 || (experts && experts->shape(0) != x.shape(0)))
        throw Error(ErrorKind::argument, "there is nothing to multiply, or experts don't fit");
    task.weights = rows.data();
    task.x = x.data();
    if (experts) {
        task.experts = experts->data();
        task.n_used = static_cast<int64_t>(experts->shape(1));
        task.n_experts = n_experts;
        for (size_t i = 0; i < experts->size(); ++i) {
            if (experts->data()[i] < 0 || experts->data()[i] >= n_experts)
                throw Error(ErrorKind::argument, "there is no such expert");
        }
    }
    std::vector<float> result;
    {
        const WithoutGil release;
        result = matrix::multiply_once(task);
    }
    return to_numpy(result.data(), {x.shape(0), result.size() / x.shape(0)});
}

// p (n_tokens, n_rows) times rows of an embedding (n_rows, bytes), as self-conditioning's dense product with
// AMX makes it -> (n_tokens, n_inner), up to matrix::kSoftColumns.
nb::object soft_sums(const Array2<float>& p, const Array2<uint8_t>& rows, const std::string& type_name,
                     int64_t n_inner) {
    const ggml_type type = type_by_name(type_name);
    const matrix::Kernel kernel = matrix::kernel_named("amx");
    const auto n_tokens = static_cast<int64_t>(p.shape(0)), n_rows = static_cast<int64_t>(p.shape(1));
    if (n_tokens < 1 || n_rows < 1 || rows.shape(0) != p.shape(1) || n_inner < 1 ||
        n_inner > matrix::kSoftColumns || !matrix::can_unpack(type, n_inner) ||
        n_inner % ggml_blck_size(type) != 0 || ggml_row_size(type, n_inner) != rows.shape(1))
        throw Error(ErrorKind::argument, "p, the rows and their type don't fit");
    std::vector<float> sums(n_tokens * n_inner);
    {
        const matrix::Readiness ready(kernel);
        matrix::SoftSums soft(n_tokens);
        for (int64_t first = 0; first < n_rows; first += matrix::kSoftRows) {
            std::vector<const float*> of_token(n_tokens);
            for (int64_t t = 0; t < n_tokens; ++t) of_token[t] = p.data() + t * n_rows + first;
            const auto* data = reinterpret_cast<const char*>(rows.data()) + first * rows.shape(1);
            soft.add(of_token.data(), n_tokens,
                     {type, data, rows.shape(1), std::min(matrix::kSoftRows, n_rows - first), 0, n_inner});
        }
        for (int64_t t = 0; t < n_tokens; ++t) soft.add_to(sums.data() + t * n_inner, t, n_inner);
    }
    return to_numpy(sums.data(), {p.shape(0), static_cast<size_t>(n_inner)});
}

// A benchmark may take seconds: without the GIL.
double matrix_rate(int n_threads, const std::string& type_name, const std::string& device,
                   const std::string& kernels) {
    const ggml_type type = type_by_name(type_name);
    const WithoutGil release;
    return measure_matrix_rate(n_threads, type, device, kernels);
}

double read_rate(int n_threads, const std::string& device) {
    const WithoutGil release;
    return measure_read_rate(n_threads, device);
}

nb::dict version() {
    const std::pair<const char*, int> features[] = {
        {"AVX", ggml_cpu_has_avx()},
        {"AVX2", ggml_cpu_has_avx2()},
        {"FMA", ggml_cpu_has_fma()},
        {"F16C", ggml_cpu_has_f16c()},
        {"AVX512", ggml_cpu_has_avx512()},
        {"AVX512_VNNI", ggml_cpu_has_avx512_vnni()},
        {"AVX512_BF16", ggml_cpu_has_avx512_bf16()},
        {"AMX_INT8", ggml_cpu_has_amx_int8()},
        {"NEON", ggml_cpu_has_neon()},
        {"SVE", ggml_cpu_has_sve()},
    };
    std::string cpu;
    for (const auto& [name, has] : features) {
        if (has) cpu += (cpu.empty() ? "" : " ") + std::string(name);
    }
    nb::dict d;
    d["ggml"] = ggml_version();
    d["ggml_commit"] = ggml_commit();
    d["nanobind"] = format("%d.%d.%d", NB_VERSION_MAJOR, NB_VERSION_MINOR, NB_VERSION_PATCH);
    d["cpu"] = cpu;
    return d;
}

}  // namespace

void bind_functions(nb::module_& m) {
    m.def("version", version,
          "Versions of what is linked in, and the instruction sets that it was built for.");
    m.def("tensor_types", tensor_types, "Type name -> (ggml's number, weights per block, bytes per block).");
    m.def("quantize_rows", quantize, nb::arg("rows").noconvert(), nb::arg("type"), nb::arg("n_threads") = 0,
          nb::arg("importance").noconvert().none() = nb::none(),
          "Rows (n_rows, n_per_row) float32 -> blocks (n_rows, bytes_per_row) uint8.");
    m.def("dequantize_rows", dequantize, nb::arg("data").noconvert(), nb::arg("type"), nb::arg("n_per_row"),
          "Blocks (n_rows, bytes_per_row) uint8 -> rows (n_rows, n_per_row) float32.");
    m.def("convert_rows", convert, nb::arg("data").noconvert(), nb::arg("source"), nb::arg("target"),
          nb::arg("n_per_row"), nb::arg("importance").noconvert().none() = nb::none(),
          nb::arg("keeps_nonfinite") = false,
          "Blocks (n_rows, bytes_per_row) uint8 of one type as those of another, on the calling thread, and "
          "-1 or the index of the first weight that is not finite, from whose rows on nothing was written.");
    m.def("find_nonfinite", nonfinite_weight, nb::arg("data").noconvert(), nb::arg("type"),
          nb::arg("n_per_row"), "The index of the first weight that is not finite, or -1.");
    m.def("row_errors", errors_of_rows, nb::arg("data").noconvert(), nb::arg("type"),
          nb::arg("rows").noconvert(),
          "Sums of squares of each of the rows (n_rows, n_per_row) float32, and of what the blocks differ "
          "from them: two of (n_rows,) float64.");
    m.def("measure_read_rate", read_rate, nb::arg("n_threads"), nb::arg("device") = "cpu",
          "Bytes per second read from memory; on a device, read and written by a copy.");
    m.def("measure_matrix_rate", matrix_rate, nb::arg("n_threads"), nb::arg("type"),
          nb::arg("device") = "cpu", nb::arg("kernels") = "auto",
          "Operations per second of a 4096 x 4096 matrix of a tensor type times 256 columns.");
    m.def("kernels", matrix::kernel_names, "The kernels of products that this processor has.");
    m.def("multiply", multiply, nb::arg("kernels"), nb::arg("rows").noconvert(), nb::arg("type"),
          nb::arg("x").noconvert(), nb::arg("experts").noconvert() = nb::none(), nb::arg("n_experts") = 1,
          nb::arg("n_threads") = 1, "Columns times rows of weights, as a model's graphs multiply them.");
    m.def("soft_sums", soft_sums, nb::arg("p").noconvert(), nb::arg("rows").noconvert(), nb::arg("type"),
          nb::arg("n_inner"), "Sums of embedding rows weighted by probabilities, with AMX.");
    m.def("step_temperature", step_temperature, nb::arg("step"), nb::arg("steps"), nb::arg("t_min"),
          nb::arg("t_max"));
    m.def("measure", measure, nb::arg("logits").noconvert(), nb::arg("temperature"),
          nb::arg("u").noconvert());
    m.def("accept", accept_mask, nb::arg("entropy").noconvert(), nb::arg("bound"));
    m.def("random_draws", random_draws, nb::arg("seed"), nb::arg("canvas_index"), nb::arg("step"),
          nb::arg("n"), nb::arg("n_vocab"));
}

}  // namespace pydiffusion
