// Device plan: which layers and experts go to which device.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend/devices.h"
#include "ggml.h"

namespace pydiffusion {

// The last layers of the model in contiguous ranges, one per device; the last device also holds the tensors
// that belong to no layer. The last n_cpu_moe layers leave their experts in the file's mapping, computed by
// the CPU.
struct DevicePlan {
    int32_t n_layer = 0;
    std::vector<int32_t> device_layers;
    int32_t n_cpu_moe = 0;
    bool dense_bf16 = false;  // quantized matrices on devices, but for experts, are held as BF16

    int32_t n_gpu_layers() const;
    bool any() const { return n_gpu_layers() > 0; }
    bool single_device() const;
    // The device that embeds, samples and holds the tensors of no layer.
    int32_t main_device() const {
        return any() ? static_cast<int32_t>(device_layers.size()) - 1 : kCpuDevice;
    }
    // These return a device's index or kCpuDevice.
    int32_t layer_device(int32_t i) const;
    int32_t experts_device(int32_t i) const { return i < n_layer - n_cpu_moe ? layer_device(i) : kCpuDevice; }
    int32_t tensor_device(const std::string& name) const;  // by name in the file
    // Type on its device of a tensor that has this type in the file.
    ggml_type device_type(const std::string& name, ggml_type type) const;
};

// Index of the layer that a tensor belongs to by its name; -1 if none.
int32_t layer_of_tensor(const std::string& name);
// Matrices of experts, and the scales of their results; ffn_down_exps.scale is the router's.
bool is_expert_tensor(const std::string& name);

}  // namespace pydiffusion
