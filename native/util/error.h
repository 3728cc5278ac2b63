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

// printf-style construction, so that messages can name keys and numbers.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
std::string format(const char* pattern, ...);

// Quotes a name from a file for a message: printable ASCII only, at most 80 characters.
std::string quoted(const std::string& name);

// Throws Error(out_of_memory) unless the system still gives that much address space. ggml aborts the process
// where one of its small allocations fails; asking beforehand, for more than they add up to, turns that into
// an error. Nothing stays allocated, and no page is touched.
void require_memory(size_t n_bytes);

// Routes ggml's log and abort messages here: once per process.
void install_ggml_handlers();

}  // namespace pydiffusion
