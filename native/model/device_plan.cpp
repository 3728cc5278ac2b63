#include "model/device_plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>

namespace pydiffusion {

bool is_expert_tensor(const std::string& name) {
    const auto has = [&name](const char* part) { return name.find(part) != std::string::npos; };
    return has("_exps.weight") || has("gate_exps.scale") || has("up_exps.scale");
}

int32_t layer_of_tensor(const std::string& name) {
    if (name.rfind("blk.", 0) != 0) return -1;
    const long i = std::strtol(name.c_str() + std::strlen("blk."), nullptr, 10);
    return static_cast<int32_t>(std::min<long>(std::max<long>(i, -1), std::numeric_limits<int32_t>::max()));
}

int32_t DevicePlan::n_gpu_layers() const {
    return std::accumulate(device_layers.begin(), device_layers.end(), 0);
}

bool DevicePlan::single_device() const {
    return n_cpu_moe == 0 && (!any() || (device_layers.size() == 1 && device_layers[0] == n_layer));
}

int32_t DevicePlan::layer_device(int32_t i) const {
    int32_t first = n_layer - n_gpu_layers();
    if (i < first) return kCpuDevice;
    for (size_t device = 0; device < device_layers.size(); ++device) {
        first += device_layers[device];
        if (i < first) return static_cast<int32_t>(device);
    }
    return kCpuDevice;
}

int32_t DevicePlan::tensor_device(const std::string& name) const {
    const int32_t i = layer_of_tensor(name);
    return i < 0 ? main_device() : is_expert_tensor(name) ? experts_device(i) : layer_device(i);
}

ggml_type DevicePlan::device_type(const std::string& name, ggml_type type) const {
    return dense_bf16 && ggml_is_quantized(type) && !is_expert_tensor(name) ? GGML_TYPE_BF16 : type;
}

}  // namespace pydiffusion
