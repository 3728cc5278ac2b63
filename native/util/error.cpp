#include "util/error.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "ggml-backend.h"
#include "ggml.h"

#if !defined(_WIN32)
#include <sys/mman.h>
#endif

namespace pydiffusion {

std::string format(const char* pattern, ...) {
    va_list arguments;
    va_start(arguments, pattern);
    va_list again;
    va_copy(again, arguments);
    const int n = std::vsnprintf(nullptr, 0, pattern, arguments);
    va_end(arguments);
    std::string text(n > 0 ? n : 0, '\0');
    if (n > 0) std::vsnprintf(&text[0], text.size() + 1, pattern, again);
    va_end(again);
    return text;
}

std::string quoted(const std::string& name) {
    std::string text = "'";
    for (const unsigned char c : name.substr(0, 80)) {
        if (c >= 0x20 && c < 0x7f) {
            text += static_cast<char>(c);
        } else {
            text += format("\\x%02x", c);
        }
    }
    return text + (name.size() > 80 ? "...'" : "'");
}

namespace {

// A ggml assertion failed, which our validation should have prevented; ggml aborts the process after this
// returns.
void on_ggml_abort(const char* message) {
    std::fprintf(stderr,
                 "pydiffusion: internal error in ggml, aborting: %s\n"
                 "pydiffusion: please report this message with the model's file name and the command\n",
                 message);
}

// ggml's warnings repeat our own errors; print only its errors, and only on request.
void on_ggml_log(ggml_log_level level, const char* text, void*) {
    if (level == GGML_LOG_LEVEL_ERROR && std::getenv("PYDIFFUSION_DEBUG")) std::fputs(text, stderr);
}

}  // namespace

void require_memory(size_t n_bytes) {
#if !defined(_WIN32)
    void* address = mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) {
        throw Error(ErrorKind::out_of_memory, format("out of memory: failed to allocate another %.1f MB",
                                                     static_cast<double>(n_bytes) / 1e6));
    }
    munmap(address, n_bytes);
#else
    (void)n_bytes;
#endif
}

void install_ggml_handlers() {
    static std::once_flag once;
    std::call_once(once, [] {
        ggml_set_abort_callback(on_ggml_abort);
        ggml_log_set(on_ggml_log, nullptr);
    });
}

}  // namespace pydiffusion
