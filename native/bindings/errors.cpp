// Translates C++ exceptions to pydiffusion.errors; handles the GIL, including at interpreter exit.
#include <atomic>
#include <chrono>
#include <new>
#include <thread>

#include "backend/backend.h"
#include "bindings/bindings.h"
#include "util/error.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif

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
        PyErr_SetObject(PyExc_ValueError, to_str(message).ptr());
        return;
    }
    const nb::object type = nb::module_::import_("pydiffusion.errors").attr(python_class(kind));
    PyErr_SetObject(type.ptr(), to_str(message).ptr());
}

// Set by the atexit handler. From then on only daemon threads remain besides the finalizing one, and they
// must not touch the interpreter again.
std::atomic<bool> finalizing{false};
std::atomic<std::thread::id> finalizing_thread;
// Threads that released the GIL, and those of them that sleep until the process exits.
std::atomic<int> n_without_gil{0}, n_parked{0};
thread_local int gil_release_depth = 0;  // this thread's share of n_without_gil

// How long the exit handler waits for computing threads.
constexpr auto kExitTimeout = std::chrono::seconds(5);

bool must_not_return() { return finalizing && finalizing_thread.load() != std::this_thread::get_id(); }

[[noreturn]] void park() {
    ++n_parked;
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

bool has_other_threads() {
    PyThreadState* first = PyInterpreterState_ThreadHead(PyInterpreterState_Get());
    return first && PyThreadState_Next(first);
}

// Aborts running graphs and parks their threads, so that none of our code runs while the interpreter and
// static objects are destroyed.
void on_interpreter_exit() {
    finalizing_thread = std::this_thread::get_id();
    finalizing = true;
    if (has_other_threads()) nb::set_leak_warnings(false);  // objects held by those threads are never freed
    Backend::stop();
    const nb::gil_scoped_release release;  // a callback on such a thread may need the GIL to finish
    const auto deadline = std::chrono::steady_clock::now() + kExitTimeout;
    while (n_parked < n_without_gil && std::chrono::steady_clock::now() < deadline)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

}  // namespace

WithoutGil::WithoutGil() : state_(PyEval_SaveThread()) {
    ++n_without_gil;
    ++gil_release_depth;
    if (must_not_return()) park();
}

WithoutGil::~WithoutGil() {
    if (must_not_return()) park();
    try {
        PyEval_RestoreThread(state_);
    } catch (...) {  // forced unwinding by the finalizing interpreter
        park();
    }
    --gil_release_depth;
    --n_without_gil;
}

void with_gil(const std::function<void()>& call) {
    if (must_not_return()) park();
    try {
        const PyGILState_STATE state = PyGILState_Ensure();
        // No RAII: during forced unwinding by the interpreter, this thread does not hold the GIL.
        std::exception_ptr error;
        try {
            call();
        } catch (const std::exception&) {
            error = std::current_exception();
        }
        PyGILState_Release(state);
        if (error) std::rethrow_exception(error);
    } catch (const std::exception&) {
        throw;
    } catch (...) {
        park();
    }
}

void register_exit_handler() {
    nb::module_::import_("atexit").attr("register")(nb::cpp_function(on_interpreter_exit));
#if !defined(_WIN32)
    // The child has only this thread; objects held by the others are never freed there.
    pthread_atfork(nullptr, nullptr, [] {
        if (n_without_gil > gil_release_depth) nb::set_leak_warnings(false);
        n_without_gil = gil_release_depth;
        n_parked = 0;
    });
#endif
}

nb::object to_str(const std::string& text) {
    return nb::steal(
        PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogateescape"));
}

std::string from_str(const nb::str& text) {
    const nb::object bytes = nb::steal(PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogateescape"));
    if (!bytes.is_valid()) throw nb::python_error();
    return {PyBytes_AS_STRING(bytes.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(bytes.ptr()))};
}

void check_signals() {
    with_gil([] {
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
    });
}

namespace {

// Sets the Python error; rethrows other exceptions for nanobind to handle.
void translate(const std::exception_ptr& pointer, void*) {
    try {
        std::rethrow_exception(pointer);
    } catch (const Error& error) {
        raise(error.kind(), error.what());
    } catch (const std::bad_alloc&) {
        raise(ErrorKind::out_of_memory, "out of memory: an allocation failed");
    }
}

}  // namespace

nb::object to_exception(const std::exception_ptr& error) {
    translate(error, nullptr);
    return nb::borrow(nb::python_error().value());
}

void bind_errors(nb::module_&) { nb::register_exception_translator(translate); }

}  // namespace pydiffusion
