// This file and emulate.cpp are compiled without ThreadSanitizer's checks: their own memory is shared by all
// fibers on purpose.
#include "cuda_emulation/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__x86_64__) && defined(__ELF__)
#define PYDIFFUSION_OWN_SWITCH 1
#else
#include <ucontext.h>
#define PYDIFFUSION_OWN_SWITCH 0
#endif

// Defined in programs that a sanitizer instruments, null in others.
#if defined(__ELF__)
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_destroy_fiber(void*);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
}
#else
static void (*__sanitizer_start_switch_fiber)(void**, const void*, size_t) = nullptr;
static void (*__sanitizer_finish_switch_fiber)(void*, const void**, size_t*) = nullptr;
static void (*__asan_unpoison_memory_region)(const volatile void*, size_t) = nullptr;
static void* (*__tsan_get_current_fiber)() = nullptr;
static void* (*__tsan_create_fiber)(unsigned) = nullptr;
static void (*__tsan_destroy_fiber)(void*) = nullptr;
static void (*__tsan_switch_to_fiber)(void*, unsigned) = nullptr;
#endif

#if PYDIFFUSION_OWN_SWITCH
// swapcontext without its two system calls: a block of 1024 threads switches hundreds of thousands of times.
// Keeps the registers that a call preserves, stores the stack pointer in *save and goes on at `load`.
extern "C" void pydiffusion_switch_stack(void** save, void* load);
asm(R"(
.text
.type pydiffusion_switch_stack, @function
pydiffusion_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size pydiffusion_switch_stack, . - pydiffusion_switch_stack
)");
#endif

namespace pydiffusion::emulation {

namespace {

constexpr size_t kStackSize = 256 << 10;  // only the pages used take memory
constexpr size_t kStackOffset = 320;  // between the tops of stacks: else all compete for a few lines of cache
constexpr unsigned kNoSync = 1;       // ThreadSanitizer: a switch orders nothing

size_t page_size() {
    static const auto size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return size;
}

Fiber* entered = nullptr;  // the fiber whose first resume() is under way

}  // namespace

// The bottom of a fiber's stack: never returns.
void run_fiber(Fiber& fiber) {
    if (__sanitizer_finish_switch_fiber)
        __sanitizer_finish_switch_fiber(nullptr, &fiber.resumer_stack_, &fiber.resumer_stack_size_);
    for (;;) {
        fiber.work_(fiber.argument_);
        fiber.is_done_ = true;
        fiber.suspend();
    }
}

namespace {
extern "C" void pydiffusion_enter_fiber() { run_fiber(*entered); }
}  // namespace

Fiber::Fiber() {
    void* memory =
        mmap(nullptr, page_size() + kStackSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    mprotect(memory_, page_size(), PROT_NONE);  // an overflow faults
    if (__tsan_create_fiber) thread_sanitizer_own_ = __tsan_create_fiber(0);
    static size_t n_fibers = 0;
    offset_ = n_fibers++ * kStackOffset % page_size();
    reset_stack();
}

Fiber::~Fiber() {
    if (__tsan_destroy_fiber) __tsan_destroy_fiber(thread_sanitizer_own_);
    munmap(memory_, page_size() + kStackSize);
#if !PYDIFFUSION_OWN_SWITCH
    delete static_cast<ucontext_t*>(own_);
    delete static_cast<ucontext_t*>(resumer_);
#endif
}

void Fiber::reset_stack() {
    char* stack = memory_ + page_size();
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, kStackSize);
    is_fresh_ = true;
#if PYDIFFUSION_OWN_SWITCH
    // As the switch leaves a stack: six registers, then where to return to. One more word puts the stack
    // pointer where a call would have put it.
    auto* top = reinterpret_cast<uint64_t*>(stack + kStackSize - offset_) - 8;
    for (int i = 0; i < 8; ++i) top[i] = 0;
    top[6] = reinterpret_cast<uint64_t>(&pydiffusion_enter_fiber);
    own_ = top;
#else
    if (!own_) own_ = new ucontext_t;
    if (!resumer_) resumer_ = new ucontext_t;
    auto* context = static_cast<ucontext_t*>(own_);
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = kStackSize - offset_;
    context->uc_link = nullptr;
    makecontext(context, pydiffusion_enter_fiber, 0);
#endif
}

void Fiber::start(void (*work)(void*), void* argument) {
    work_ = work;
    argument_ = argument;
    is_done_ = false;
}

void Fiber::switch_in() {
#if PYDIFFUSION_OWN_SWITCH
    pydiffusion_switch_stack(&resumer_, own_);
#else
    swapcontext(static_cast<ucontext_t*>(resumer_), static_cast<ucontext_t*>(own_));
#endif
}

void Fiber::switch_out() {
#if PYDIFFUSION_OWN_SWITCH
    pydiffusion_switch_stack(&own_, resumer_);
#else
    swapcontext(static_cast<ucontext_t*>(own_), static_cast<ucontext_t*>(resumer_));
#endif
}

void Fiber::resume() {
    if (is_fresh_) entered = this;
    is_fresh_ = false;
    void* fake_stack = nullptr;
    if (__sanitizer_start_switch_fiber)
        __sanitizer_start_switch_fiber(&fake_stack, memory_ + page_size(), kStackSize);
    if (__tsan_switch_to_fiber) {
        thread_sanitizer_resumer_ = __tsan_get_current_fiber();
        __tsan_switch_to_fiber(thread_sanitizer_own_, kNoSync);
    }
    switch_in();
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void Fiber::suspend() {
    void* fake_stack = nullptr;
    if (__sanitizer_start_switch_fiber)
        __sanitizer_start_switch_fiber(&fake_stack, resumer_stack_, resumer_stack_size_);
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(thread_sanitizer_resumer_, kNoSync);
    switch_out();
    if (__sanitizer_finish_switch_fiber)
        __sanitizer_finish_switch_fiber(fake_stack, &resumer_stack_, &resumer_stack_size_);
}

}  // namespace pydiffusion::emulation
