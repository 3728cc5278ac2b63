// What of a model lies on which device, and what that takes there.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/devices.h"
#include "ggml-backend.h"
#include "model/hparams.h"

namespace pydiffusion {

// The last layers of a model in runs, one for each device, and on the last device all that is in no layer. Of
// these layers the last n_cpu_moe leave their experts in the file's mapping, to be computed by the
// processor.
struct DevicePlan {
    int32_t n_layer = 0;
    std::vector<int32_t> device_layers;
    int32_t n_cpu_moe = 0;

    int32_t n_gpu_layers() const;
    bool any() const { return n_gpu_layers() > 0; }
    bool single_device() const;
    // The device that embeds, samples and holds what is in no layer.
    int32_t main_device() const {
        return any() ? static_cast<int32_t>(device_layers.size()) - 1 : kCpuDevice;
    }
    // Where these lie: a device, or kCpuDevice.
    int32_t layer_device(int32_t i) const;
    int32_t experts_device(int32_t i) const { return i < n_layer - n_cpu_moe ? layer_device(i) : kCpuDevice; }
    int32_t tensor_device(const std::string& name) const;  // by its name in the file
};

// Memory of a device, as a plan sees it.
struct DeviceMemory {
    ggml_backend_buffer_type_t type;  // knows what a tensor takes there
    uint64_t room;                    // bytes to plan with at most
    uint64_t kept_free;               // bytes that are free beside them
};

// What sessions are planned for.
struct SessionNeeds {
    int64_t n_ctx;
    ggml_type kv_type;
    uint64_t n_sessions;
};

// Bytes on a device.
struct DeviceUse {
    uint64_t weights = 0;
    uint64_t cache = 0;  // of all sessions, as the step
    uint64_t step = 0;   // logits of a canvas, activations, work areas

    uint64_t total() const { return weights + cache + step; }
};

// One for each device of the device_plan, which are those of `memory`.
std::vector<DeviceUse> device_use(const GgufFile& file, const Hparams& hparams, const DevicePlan& device_plan,
                                  const SessionNeeds& needs, const std::vector<DeviceMemory>& memory);

// The device_plan that brings most of the work to devices with so much memory: all of the model; else all
// layers with the experts of as few as possible left out; else as many layers as fit without their experts.
// Devices share the layers in proportion to what the step and all that is in no layer leave free on them.
// What is given (not -1) is taken as it is.
DevicePlan plan_devices(const GgufFile& file, const Hparams& hparams, const SessionNeeds& needs,
                        const std::vector<DeviceMemory>& memory, int32_t n_gpu_layers, int32_t n_cpu_moe);

}  // namespace pydiffusion
