// C++ exceptions become the Python classes of pydiffusion.errors here, and nowhere else; and the
// interpreter's lock.
#include "errors.h"

#include <atomic>
#include <chrono>
#include <new>
#include <thread>

#include "bindings.h"

namespace pydiffusion {

namespace {

const char* python_class(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::format:
            return "ModelFormatError";
        case ErrorKind::unsupported:
            return "UnsupportedModelError";
        case ErrorKind::context_overflow:
            return "ContextOverflowError";
        case ErrorKind::out_of_memory:
            return "InsufficientMemoryError";
        case ErrorKind::cancelled:
            return "GenerationCancelled";
        case ErrorKind::general:
        case ErrorKind::argument:
            break;
    }
    return "PyDiffusionError";
}

void raise(ErrorKind kind, const char* message) {
    if (kind == ErrorKind::argument) {
        PyErr_SetString(PyExc_ValueError, message);
        return;
    }
    const nb::object type = nb::module_::import_("pydiffusion.errors").attr(python_class(kind));
    PyErr_SetString(type.ptr(), message);
}

// The interpreter's end, as told by its atexit: only daemon threads are left besides the one that ends it,
// and must not touch it again.
std::atomic<bool> ending{false};
std::atomic<std::thread::id> ender;
std::atomic<int> n_computing{0};

bool must_not_return() { return ending && ender.load() != std::this_thread::get_id(); }

[[noreturn]] void sleep_for_ever() {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

}  // namespace

WithoutGil::WithoutGil() : state_(PyEval_SaveThread()) { ++n_computing; }

WithoutGil::~WithoutGil() {
    if (must_not_return()) sleep_for_ever();
    --n_computing;
    try {
        PyEval_RestoreThread(state_);
    } catch (...) {  // the unwinding of a thread that the interpreter ends
        sleep_for_ever();
    }
}

WithGil::WithGil() {
    if (must_not_return()) sleep_for_ever();
    try {
        state_ = PyGILState_Ensure();
    } catch (...) {
        sleep_for_ever();
    }
}

void watch_for_the_end() {
    nb::module_::import_("atexit").attr("register")(nb::cpp_function([] {
        ender = std::this_thread::get_id();
        ending = true;
        if (n_computing > 0) nb::set_leak_warnings(false);  // what those threads hold can't be given back
    }));
}

nb::object to_str(const std::string& text) {
    return nb::steal(
        PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogateescape"));
}

void check_signals() {
    const WithGil gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

namespace {

// Sets Python's error; what is not ours passes through.
void translate(const std::exception_ptr& pointer, void*) {
    try {
        std::rethrow_exception(pointer);
    } catch (const Error& error) {
        raise(error.kind(), error.what());
    } catch (const std::bad_alloc&) {
        raise(ErrorKind::out_of_memory, "out of memory");
    }
}

}  // namespace

nb::object to_exception(const std::exception_ptr& error) {
    translate(error, nullptr);
    return nb::borrow(nb::python_error().value());
}

void bind_errors(nb::module_&) { nb::register_exception_translator(translate); }

}  // namespace pydiffusion
