// Device plan: which layers and experts go to which device, and how much memory they need there.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/devices.h"
#include "ggml-backend.h"
#include "model/hparams.h"

namespace pydiffusion {

// The last layers of the model in contiguous ranges, one per device; the last device also holds the tensors
// that belong to no layer. The last n_cpu_moe layers leave their experts in the file's mapping, computed by
// the CPU.
struct DevicePlan {
    int32_t n_layer = 0;
    std::vector<int32_t> device_layers;
    int32_t n_cpu_moe = 0;

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
};

// Memory of a device available to a plan.
struct DeviceMemory {
    ggml_backend_buffer_type_t type;  // gives a tensor's size there
    uint64_t budget;                  // bytes that a plan may use
    uint64_t reserved;                // free bytes left out of the budget
};

// What to reserve memory for: caches and steps of n_sessions.
struct SessionNeeds {
    int64_t n_ctx;
    ggml_type kv_type;
    uint64_t n_sessions;
};

// Memory use on a device, in bytes.
struct DeviceUse {
    uint64_t weights = 0;
    uint64_t cache = 0;  // of all sessions
    uint64_t step = 0;   // of all sessions: logits of a canvas, activations, work buffers

    uint64_t total() const { return weights + cache + step; }
};

// Estimated use of each device of the plan; `memory` has one entry per device.
std::vector<DeviceUse> device_use(const GgufFile& file, const Hparams& hparams, const DevicePlan& device_plan,
                                  const SessionNeeds& needs, const std::vector<DeviceMemory>& memory);

// Chooses the plan that offloads the most work within the devices' budgets: the whole model; else all layers
// with the experts of as few as possible left on the CPU; else as many layers as fit without their experts.
// Layers are split across devices in proportion to the memory left after the step and the tensors of no
// layer. Counts other than -1 are used as given.
DevicePlan plan_devices(const GgufFile& file, const Hparams& hparams, const SessionNeeds& needs,
                        const std::vector<DeviceMemory>& memory, int32_t n_gpu_layers, int32_t n_cpu_moe);

}  // namespace pydiffusion
