// What of a model lies on the device, and what that takes there.
#pragma once

#include <cstdint>
#include <string>

#include "hyperparameters.h"

namespace pydiffusion {

// The last n_device_layers layers, with all that is in no layer; of these the last n_host_experts leave their
// experts in the file's mapping, to be computed by the processor.
struct Placement {
    int32_t n_layer = 0;
    int32_t n_device_layers = 0;
    int32_t n_host_experts = 0;

    bool one_place() const { return n_host_experts == 0 && (!any() || n_device_layers == n_layer); }
    bool any() const { return n_device_layers > 0; }
    bool layer(int32_t i) const { return any() && i >= n_layer - n_device_layers; }
    bool experts(int32_t i) const { return layer(i) && i < n_layer - n_host_experts; }
    // By a tensor's name in the file.
    bool tensor(const std::string& name) const;
};

// Bytes on the device.
struct DeviceUse {
    uint64_t weights = 0;
    uint64_t cache = 0;  // of one session
    uint64_t step = 0;   // logits of a canvas, activations, work areas

    uint64_t total() const { return weights + cache + step; }
};

DeviceUse device_use(const File& file, const Hyperparameters& hparams, const Placement& placement,
                     int64_t n_ctx, ggml_type kv_type);

// The placement that brings most of the work to a device with so much free memory: all of the model; else all
// layers with the experts of as few as possible left out; else as many layers as fit without their experts.
// What is given (not -1) is taken as it is.
Placement plan_placement(const File& file, const Hyperparameters& hparams, int64_t n_ctx, ggml_type kv_type,
                         uint64_t free_bytes, int32_t n_device_layers, int32_t n_host_experts);

}  // namespace pydiffusion
