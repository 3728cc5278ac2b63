// ThreadSanitizer, where it instruments the program: which accesses are ordered, and its reports. Else all
// this does nothing.
#pragma once

namespace pydiffusion::emulation {

// What happened before release(key) is ordered before what follows acquire(key).
void acquire(void* key);
void release(void* key);

// While the emulation works on its own memory in a kernel's thread: ThreadSanitizer ignores the library
// functions called then, which it checks in files compiled without its checks too.
class Unchecked {
  public:
    Unchecked();
    ~Unchecked();
    Unchecked(const Unchecked&) = delete;
    Unchecked& operator=(const Unchecked&) = delete;
};

// Throws EmulationError if a race was reported since the last call.
void throw_if_raced();

}  // namespace pydiffusion::emulation
