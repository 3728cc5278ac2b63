// Helpers shared by the Python bindings. No other folder of native/ depends on Python.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "ggml.h"
#include "sampler/sampler_options.h"

namespace nb = nanobind;

namespace pydiffusion {

template <typename T>
using Array1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Array2 = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A new numpy array that owns a copy of `data`.
template <typename T>
nb::object to_numpy(const T* data, std::initializer_list<size_t> shape) {
    size_t n = 1;
    for (const size_t dimension : shape) n *= dimension;
    T* copy = new T[n];
    std::copy_n(data, n, copy);
    nb::capsule owner(copy, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, T>(copy, shape, owner));
}

template <typename T>
nb::object to_numpy(const std::vector<T>& values) {
    return to_numpy(values.data(), {values.size()});
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

// Registers an atexit handler that stops computing threads and puts them to sleep.
void register_exit_handler();

// Tensor type by name, case-insensitive; throws Error(argument) if there is none.
ggml_type type_by_name(const std::string& name);

// The option's value as an int or a float.
nb::object option_value(const SamplerOption& option, double value);

// The Python exception for a C++ exception, as raised by the bindings.
nb::object to_exception(const std::exception_ptr& error);

void bind_errors(nb::module_& m);
void bind_file(nb::module_& m);
void bind_model(nb::module_& m);
void bind_session(nb::module_& m);
void bind_batch(nb::module_& m);
void bind_quantize(nb::module_& m);
void bind_sampler(nb::module_& m);
void bind_bench(nb::module_& m);
void bind_testing(nb::module_& m);

}  // namespace pydiffusion
