#include "backend/devices.h"

#include "backend/own_kernels.h"
#include "backend/step_backend.h"
#include "util/error.h"

namespace pydiffusion {

bool is_supported_gpu(ggml_backend_dev_t device) {
    const enum ggml_backend_dev_type type = ggml_backend_dev_type(device);
    return (type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU) &&
           has_step_backend(device);
}

namespace {

std::vector<ggml_backend_dev_t> gpus() {
    std::vector<ggml_backend_dev_t> found;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        if (is_supported_gpu(device)) found.push_back(device);
    }
    return found;
}

}  // namespace

bool multiplies_bf16_fast(const std::string& name) {
#if defined(PYDIFFUSION_CUDA)
    ggml_backend_dev_t gpu = find_gpu(name);
    const int capability = gpu ? compute_capability(gpu) : 0;
    return capability == 800 || capability == 900 || capability == 1000 || capability == 1030;
#else
    (void)name;
    return false;
#endif
}

ggml_backend_dev_t find_gpu(const std::string& name) {
    for (ggml_backend_dev_t device : gpus()) {
        if (name == ggml_backend_dev_name(device)) return device;
    }
    return nullptr;
}

std::vector<DeviceInfo> list_devices() {
    std::vector<DeviceInfo> infos;
    for (ggml_backend_dev_t device : gpus()) {
        DeviceInfo info;
        info.name = ggml_backend_dev_name(device);
        info.description = ggml_backend_dev_description(device);
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(device, &free, &total);
        info.free_bytes = free;
        info.total_bytes = total;
        infos.push_back(info);
    }
    return infos;
}

std::string why_no_device(const std::string& name) {
    ggml_backend_dev_t known = ggml_backend_dev_by_name(name.c_str());
    if (!known || name != ggml_backend_dev_name(known))  // ggml ignores case
        return "there is no device " + quoted(name) + " (see `pydiffusion devices`)";
    const char* backend = ggml_backend_reg_name(ggml_backend_dev_backend_reg(known));
    return "the device " + quoted(name) + " belongs to ggml's " + backend +
           " backend, for which this build has no kernels: use device=\"cpu\" (--device cpu)";
}

ggml_backend_buffer_type_t buffer_type_of(const std::string& name) {
    ggml_backend_dev_t gpu = find_gpu(name);
    return gpu ? ggml_backend_dev_buffer_type(gpu) : ggml_backend_cpu_buffer_type();
}

}  // namespace pydiffusion
