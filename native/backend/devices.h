// The devices that this build can compute on.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ggml-backend.h"

namespace pydiffusion {

// A place beside the devices, which are 0, 1, ...
constexpr int32_t kCpuDevice = -1;

// A GPU that this build can compute on; empty names nothing.
struct DeviceInfo {
    std::string name;         // "CUDA0", ...
    std::string description;  // "NVIDIA GeForce RTX 4090"
    uint64_t free_bytes = 0;
    uint64_t total_bytes = 0;
};

std::vector<DeviceInfo> list_devices();

// What is wrong with a name that is none of theirs.
std::string why_no_device(const std::string& name);

// What allocates on the device of this name, be it "host"; the device is not opened.
ggml_backend_buffer_type_t buffer_type_of(const std::string& name);

// The GPU of this name, null where there is none that this build has kernels for.
ggml_backend_dev_t find_gpu(const std::string& name);
bool is_supported_gpu(ggml_backend_dev_t device);

}  // namespace pydiffusion
