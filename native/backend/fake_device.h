// Fake GPU for tests: a ggml device that computes with the CPU backend but has its own buffer type. ggml's
// scheduler copies to and from it as it would with a GPU, so device plans can be tested without GPUs.
#pragma once

#include "ggml-cpp.h"
#include "ggml-cpu.h"

namespace pydiffusion {

// Name of the ggml registry that the device says it is from.
constexpr char kFakeRegistry[] = "host";

// `threads` must outlive the backend, and the backend its buffers. Null if out of memory.
ggml_backend_ptr make_fake_device(int n_threads, ggml_threadpool_t threads);

}  // namespace pydiffusion
