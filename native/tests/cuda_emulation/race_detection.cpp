#include "cuda_emulation/race_detection.h"

#include "cuda_emulation/emulate.h"

// Defined in programs that ThreadSanitizer instruments, null in others.
#if defined(__ELF__)
extern "C" {
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
__attribute__((weak)) void AnnotateIgnoreReadsBegin(const char*, int);
__attribute__((weak)) void AnnotateIgnoreReadsEnd(const char*, int);
__attribute__((weak)) void AnnotateIgnoreWritesBegin(const char*, int);
__attribute__((weak)) void AnnotateIgnoreWritesEnd(const char*, int);
}
#else
static void (*__tsan_acquire)(void*) = nullptr;
static void (*__tsan_release)(void*) = nullptr;
static void (*AnnotateIgnoreReadsBegin)(const char*, int) = nullptr;
static void (*AnnotateIgnoreReadsEnd)(const char*, int) = nullptr;
static void (*AnnotateIgnoreWritesBegin)(const char*, int) = nullptr;
static void (*AnnotateIgnoreWritesEnd)(const char*, int) = nullptr;
#endif

namespace pydiffusion::emulation {

namespace {

int n_races = 0;

}  // namespace

void acquire(void* key) {
    if (__tsan_acquire) __tsan_acquire(key);
}

void release(void* key) {
    if (__tsan_release) __tsan_release(key);
}

Unchecked::Unchecked() {
    if (!AnnotateIgnoreReadsBegin) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}

Unchecked::~Unchecked() {
    if (!AnnotateIgnoreReadsEnd) return;
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
}

void throw_if_raced() {
    if (n_races == 0) return;
    n_races = 0;
    throw EmulationError("a data race: see ThreadSanitizer's report above");
}

}  // namespace pydiffusion::emulation

// ThreadSanitizer calls this for each race; it must see it.
extern "C" __attribute__((visibility("default"))) void __tsan_on_report(void*) {
    ++pydiffusion::emulation::n_races;
}
