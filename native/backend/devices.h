// The devices that this build can compute on.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ggml-backend.h"

namespace pydiffusion {

// Index of the CPU, beside the devices 0, 1, ...
constexpr int32_t kCpuDevice = -1;

// A GPU that this build can compute on.
struct DeviceInfo {
    std::string name;         // "CUDA0", ...
    std::string description;  // "NVIDIA GeForce RTX 4090"
    uint64_t free_bytes = 0;
    uint64_t total_bytes = 0;
};

std::vector<DeviceInfo> list_devices();

// Error message for a name that list_devices() does not contain.
std::string why_no_device(const std::string& name);

// Buffer type of the named device, or the CPU's for "host". Does not initialize the device.
ggml_backend_buffer_type_t buffer_type_of(const std::string& name);

// Whether the named device is a GPU whose tensor cores multiply BF16 with float32 sums at full rate: data
// centre GPUs from A100 on (compute capability 8.0, 9.0, 10.0, 10.3). GeForce's have half of it or less.
bool multiplies_bf16_fast(const std::string& name);

// The GPU of this name; null if there is none that this build has kernels for.
ggml_backend_dev_t find_gpu(const std::string& name);
bool is_supported_gpu(ggml_backend_dev_t device);

}  // namespace pydiffusion
