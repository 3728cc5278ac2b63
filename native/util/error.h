// Typed errors of the native layers; the bindings translate each kind into its Python class.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace pydiffusion {

enum class ErrorKind {
    general,
    format,            // ModelFormatError
    unsupported,       // UnsupportedModelError
    context_overflow,  // ContextOverflowError
    out_of_memory,     // InsufficientMemoryError
    cancelled,         // GenerationCancelled
    argument,          // ValueError
};

class Error : public std::runtime_error {
  public:
    Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
    ErrorKind kind() const { return kind_; }

  private:
    ErrorKind kind_;
};

// printf into a string.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
std::string format(const char* pattern, ...);

// Quotes a name from a file for a message: escapes all but printable ASCII, and cuts at 80 characters.
std::string quoted(const std::string& name);

// Throws Error(out_of_memory) if the system can't map n_bytes more. ggml aborts the process if one of its
// small allocations fails; checking first, for more than their total, turns that into an exception. Keeps
// nothing allocated and touches no page.
void require_memory(size_t n_bytes);

// Installs our handlers for ggml's log and abort messages, once per process.
void install_ggml_handlers();

}  // namespace pydiffusion
