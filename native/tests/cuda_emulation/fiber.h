// Fibers: functions that stop in the middle and go on later, each on a stack of its own, all on one OS
// thread. AddressSanitizer and ThreadSanitizer are told of every switch.
#pragma once

#include <cstddef>

namespace pydiffusion::emulation {

class Fiber {
  public:
    Fiber();
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // Makes work(argument) what the next resume() begins with; earlier work must be done. `work` must not
    // throw.
    void start(void (*work)(void*), void* argument);
    // Runs the fiber until it suspends itself or its work is done.
    void resume();
    // Back to resume(); called by the running fiber.
    void suspend();
    bool is_done() const { return is_done_; }

  private:
    friend void run_fiber(Fiber&);
    void reset_stack();
    void switch_in();
    void switch_out();

    char* memory_ = nullptr;  // a page that faults, then the stack
    size_t offset_ = 0;       // of the stack's top from the end of the memory
    void* own_ = nullptr;     // the suspended fiber's stack pointer, or its ucontext_t
    void* resumer_ = nullptr;
    void (*work_)(void*) = nullptr;
    void* argument_ = nullptr;
    bool is_done_ = true;
    bool is_fresh_ = false;

    // Of the sanitizers.
    void* thread_sanitizer_own_ = nullptr;
    void* thread_sanitizer_resumer_ = nullptr;
    const void* resumer_stack_ = nullptr;
    size_t resumer_stack_size_ = 0;
};

}  // namespace pydiffusion::emulation
