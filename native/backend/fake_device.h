// A device on the processor, in a GPU's place: ggml's own kernels, and memory that belongs to it alone. A
// scheduler moves to and from it what it would move to and from a GPU, so that device_plan can be proven
// where there is none, or only one.
#pragma once

#include "ggml-cpp.h"
#include "ggml-cpu.h"

namespace pydiffusion {

// The threads are the caller's and outlive it; so does it the buffers that come from it. Null without memory.
ggml_backend_ptr make_fake_device(int n_threads, ggml_threadpool_t threads);

}  // namespace pydiffusion
