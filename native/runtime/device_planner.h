// Device planner: how much memory layers and sessions need on a device, and the plan that fits.
#pragma once

#include <cstdint>
#include <vector>

#include "ggml-backend.h"
#include "gguf/gguf_file.h"
#include "model/device_plan.h"
#include "model/hparams.h"

namespace pydiffusion {

// Memory of a device available to a plan.
struct DeviceMemory {
    ggml_backend_buffer_type_t type;  // gives a tensor's size there
    uint64_t budget;                  // bytes that a plan may use
    uint64_t reserved;                // free bytes left out of the budget
    bool fast_bf16 = false;           // see multiplies_bf16_fast()
};

// Bytes of a device to keep free for allocations outside of our tensors: cuBLAS handles and workspaces,
// kernel code, CUDA graphs, and temporary buffers of ggml's kernels, where an allocation failure aborts the
// process.
uint64_t reserved_bytes(uint64_t free_bytes, uint64_t total_bytes);

// Memory of the smallest device, all of it free, that has room for n_bytes beside what is kept free.
uint64_t smallest_device(uint64_t n_bytes);

// What to reserve memory for: caches and steps of n_sessions, and on the main device a vision tower.
struct SessionNeeds {
    int64_t n_ctx;
    ggml_type kv_type;
    uint64_t n_sessions;
    // Soft tokens of an image: the most that caches have room for, and those that a usual image has. Work
    // buffers are counted for the usual one: a larger image, which must be asked for, allocates more when it
    // comes, or fails with InsufficientMemoryError.
    int64_t image_tokens = 0, usual_image_tokens = 0;
    uint64_t vision_weights = 0, vision_work = 0;  // bytes
};

// Memory use on a device, in bytes.
struct DeviceUse {
    uint64_t weights = 0;
    uint64_t cache = 0;  // of all sessions
    uint64_t step = 0;   // of all sessions: logits of a canvas, activations, work buffers

    uint64_t total() const { return weights + cache + step; }
};

// Types of the matrices other than experts on devices: as in the file, or BF16 instead of a quantized type.
enum class DenseType {
    file,
    bf16,
    automatic,  // BF16 if the whole model is then on devices that multiply it fast
};

// Estimated use of each device of the plan; `memory` has one entry per device.
std::vector<DeviceUse> device_use(const GgufFile& file, const Hparams& hparams, const DevicePlan& device_plan,
                                  const SessionNeeds& needs, const std::vector<DeviceMemory>& memory);

// Chooses the plan that offloads the most work within the devices' budgets: the whole model; else all layers
// with the experts of as few as possible left on the CPU; else as many layers as fit without their experts.
// Layers are split across devices in proportion to the memory left after the step and the tensors of no
// layer. Counts other than -1 are used as given.
DevicePlan plan_devices(const GgufFile& file, const Hparams& hparams, const SessionNeeds& needs,
                        const std::vector<DeviceMemory>& memory, int32_t n_gpu_layers, int32_t n_cpu_moe,
                        DenseType dense_type);

}  // namespace pydiffusion
