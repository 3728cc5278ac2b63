// Helpers shared by the Python bindings. No other folder of native/ depends on Python.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ggml.h"
#include "sampler/sampler_options.h"

namespace nb = nanobind;

namespace pydiffusion {

struct LoadedTensors;

template <typename T>
using Array1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Array2 = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Results, typed so that the stub is.
template <typename T>
using Numpy1 = nb::ndarray<nb::numpy, T, nb::ndim<1>>;
template <typename T>
using Numpy2 = nb::ndarray<nb::numpy, T, nb::ndim<2>>;

// Memory for n values, not initialized, and the capsule that frees it.
template <typename T>
std::pair<T*, nb::capsule> new_values(size_t n) {
    std::unique_ptr<T[]> values(new T[std::max<size_t>(1, n)]);  // null is no array
    nb::capsule owner(values.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return {values.release(), owner};
}

// The same for the memory of a vector.
template <typename T>
std::pair<T*, nb::capsule> keep_values(std::vector<T> values) {
    values.reserve(1);  // null is no array
    auto kept = std::make_unique<std::vector<T>>(std::move(values));
    T* data = kept->data();
    nb::capsule owner(kept.get(), [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
    kept.release();
    return {data, owner};
}

// A new numpy array [n_rows, width] for the caller to fill.
template <typename T>
Numpy2<T> new_numpy(size_t n_rows, size_t width) {
    const auto [data, owner] = new_values<T>(n_rows * width);
    return Numpy2<T>(data, {n_rows, width}, owner);
}

// A numpy array of the vector's memory, not copied.
template <typename T>
Numpy1<T> to_numpy(std::vector<T> values) {
    const size_t n = values.size();
    const auto [data, owner] = keep_values(std::move(values));
    return Numpy1<T>(data, {n}, owner);
}

// The same [n_rows, width].
template <typename T>
Numpy2<T> to_numpy(std::vector<T> values, size_t n_rows, size_t width) {
    const auto [data, owner] = keep_values(std::move(values));
    return Numpy2<T>(data, {n_rows, width}, owner);
}

inline Numpy1<bool> to_bools(const std::vector<uint8_t>& flags) {
    const auto [data, owner] = new_values<bool>(flags.size());
    std::copy(flags.begin(), flags.end(), data);
    return Numpy1<bool>(data, {flags.size()}, owner);
}

template <typename T>
std::vector<T> to_vector(const Array1<T>& array) {
    return std::vector<T>(array.data(), array.data() + array.shape(0));
}

// Text from a file may be invalid UTF-8; invalid bytes become surrogates, as with os.fsdecode.
nb::object to_str(const std::string& text);
// The inverse, so that such names and paths round-trip.
std::string from_str(const nb::str& text);

// Releases the GIL for its lifetime. Before 3.14, a finalizing interpreter terminates threads that ask for
// the GIL by unwinding their stacks, which much of our code does not survive. Such a thread sleeps until the
// process exits instead, as in 3.14.
class WithoutGil {
  public:
    WithoutGil();
    ~WithoutGil();
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;

  private:
    PyThreadState* state_;
};

// Calls `call` with the GIL held, on a thread that released it. Throws nothing but std::exception.
void with_gil(const std::function<void()>& call);

// Runs the handlers of pending signals; throws what they raise (KeyboardInterrupt). Acquires the GIL.
void check_signals();

// Calls `progress(values...)` unless it is None, after what check_signals does. Acquires the GIL.
template <typename... T>
void report(const nb::object& progress, T... values) {
    with_gil([&] {
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
        if (!progress.is_none()) progress(values...);
    });
}

// Registers an atexit handler that stops computing threads and puts them to sleep.
void register_exit_handler();

// Names of types as in the `gguf` package: "Q4_K", "F32", "IQ4_NL".
std::string upper_type_name(ggml_type type);
// Tensor type by name, case-insensitive; throws Error(argument) if there is none.
ggml_type type_by_name(const std::string& name);

// Bytes in the file by name of a type.
nb::dict weight_types(const LoadedTensors& weights);

// The option's value as an int or a float.
nb::object option_value(const SamplerOption& option, double value);

// The Python exception for a C++ exception, as raised by the bindings.
nb::object to_exception(const std::exception_ptr& error);

void bind_errors(nb::module_& m);
void bind_file(nb::module_& m);
void bind_model(nb::module_& m);
void bind_adapters(nb::module_& m);
void bind_session(nb::module_& m);
void bind_batch(nb::module_& m);
void bind_quantize(nb::module_& m);
void bind_sampler(nb::module_& m);
void bind_bench(nb::module_& m);
void bind_vision(nb::module_& m);
void bind_testing(nb::module_& m);

}  // namespace pydiffusion
