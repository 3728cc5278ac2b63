// The registry of StepBackends: one line each.
#include <map>

#include "backend/fake_device.h"
#include "backend/step_backend.h"

namespace pydiffusion {

namespace {

// By the name of ggml's registry of the devices.
std::map<std::string, MakeStepBackend>& step_backends() {
    static std::map<std::string, MakeStepBackend> all = {
        {kFakeRegistry, make_host_step_backend},
#if defined(PYDIFFUSION_CUDA)
        {"CUDA", make_cuda_step_backend},
#endif
    };
    return all;
}

MakeStepBackend find(ggml_backend_dev_t device) {
    ggml_backend_reg_t registry = device ? ggml_backend_dev_backend_reg(device) : nullptr;
    const auto found =
        registry ? step_backends().find(ggml_backend_reg_name(registry)) : step_backends().end();
    return found == step_backends().end() ? nullptr : found->second;
}

}  // namespace

std::unique_ptr<StepBackend> make_step_backend(ggml_backend_t backend) {
    const MakeStepBackend make = find(ggml_backend_get_device(backend));
    return make ? make(backend) : nullptr;
}

bool has_step_backend(ggml_backend_dev_t device) { return find(device) != nullptr; }

void register_step_backend(const std::string& ggml_backend, MakeStepBackend make) {
    step_backends()[ggml_backend] = make;
}

}  // namespace pydiffusion
