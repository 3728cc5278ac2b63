// Helpers that the bindings share. The only folder of native/ that knows Python.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "ggml.h"

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

// Text from a file may be no UTF-8; the bytes survive as surrogates.
nb::object to_str(const std::string& text);
// The other way: such a name, or a path that the system gave, is found again.
std::string from_str(const nb::str& text);

// Without the interpreter's lock while it lives. When the interpreter is ending, it ends the threads that ask
// for the lock by unwinding their stacks; since much of ours may not be unwound, such a thread sleeps until
// the process is gone, as Python does it from 3.14 on.
class WithoutGil {
  public:
    WithoutGil();
    ~WithoutGil();
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;

  private:
    PyThreadState* state_;
};

// Calls something that needs the lock on a thread that gave it up. Nothing but std::exception comes out.
void with_gil(const std::function<void()>& call);

// Runs the handlers of signals that arrived; throws what they raise (KeyboardInterrupt). Takes the GIL
// itself.
void check_signals();

// Registers what the interpreter's end has to do: computing threads are stopped and put to sleep.
void watch_for_the_end();

// By a type's name of any case; throws Error(argument) for what is none.
ggml_type type_by_name(const std::string& name);

// The Python exception that an exception of ours becomes when it is thrown to Python.
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
