// C++ exceptions become the Python classes of pydiffusion.errors here, and nowhere else; and the
// interpreter's lock.
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

// The interpreter's end, as told by its atexit: only daemon threads are left besides the one that ends it,
// and must not touch it again.
std::atomic<bool> ending{false};
std::atomic<std::thread::id> ender;
// Threads that gave up the lock, and those of them that sleep until the process is gone.
std::atomic<int> n_without_lock{0}, n_parked{0};
thread_local int depth = 0;  // how often this thread is among the former

// How long the interpreter's end waits for threads that compute.
constexpr auto kPatience = std::chrono::seconds(5);

bool must_not_return() { return ending && ender.load() != std::this_thread::get_id(); }

[[noreturn]] void park() {
    ++n_parked;
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

bool has_other_threads() {
    PyThreadState* first = PyInterpreterState_ThreadHead(PyInterpreterState_Get());
    return first && PyThreadState_Next(first);
}

// Graphs end where they are, and whoever computed one sleeps: nothing of ours runs while the interpreter and
// the process's statics are taken down.
void end_with_the_interpreter() {
    ender = std::this_thread::get_id();
    ending = true;
    if (has_other_threads()) nb::set_leak_warnings(false);  // what those threads hold can't be given back
    Backend::stop();
    const nb::gil_scoped_release release;  // a callback of theirs may need it to come to its end
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (n_parked < n_without_lock && std::chrono::steady_clock::now() < deadline)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

}  // namespace

WithoutGil::WithoutGil() : state_(PyEval_SaveThread()) {
    ++n_without_lock;
    ++depth;
    if (must_not_return()) park();
}

WithoutGil::~WithoutGil() {
    if (must_not_return()) park();
    try {
        PyEval_RestoreThread(state_);
    } catch (...) {  // the unwinding of a thread that the interpreter ends
        park();
    }
    --depth;
    --n_without_lock;
}

void with_gil(const std::function<void()>& call) {
    if (must_not_return()) park();
    try {
        const PyGILState_STATE state = PyGILState_Ensure();
        // Not a destructor's: what unwinds a thread that the interpreter ends does not hold the lock.
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

void watch_for_the_end() {
    nb::module_::import_("atexit").attr("register")(nb::cpp_function(end_with_the_interpreter));
#if !defined(_WIN32)
    // A child has this thread alone; what the others held can't be given back there.
    pthread_atfork(nullptr, nullptr, [] {
        if (n_without_lock > depth) nb::set_leak_warnings(false);
        n_without_lock = depth;
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
