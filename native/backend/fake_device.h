// Fake GPU for tests: a ggml device that computes with the CPU backend but has its own buffer type. ggml's
// scheduler copies to and from it as it would with a GPU, so device plans can be tested without GPUs.
#pragma once

#include <string>

#include "ggml-cpp.h"
#include "ggml-cpu.h"

namespace pydiffusion {

// Name of the ggml registry that the device says it is from.
constexpr char kFakeRegistry[] = "host";

// Names by which it is opened; without BF16, it stands for GPUs that can't multiply weights of that type.
constexpr char kFakeDevice[] = "host", kFakeDeviceWithoutBf16[] = "host-without-bf16";
inline bool is_fake_device(const std::string& name) {
    return name == kFakeDevice || name == kFakeDeviceWithoutBf16;
}

// `threads` must outlive the backend, and the backend its buffers. bf16: whether it multiplies weights of
// that type. Null if out of memory.
ggml_backend_ptr make_fake_device(int n_threads, ggml_threadpool_t threads, bool bf16 = true);

}  // namespace pydiffusion
