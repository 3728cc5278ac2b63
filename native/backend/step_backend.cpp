#include "backend/step_backend.h"

#include <map>
#include <vector>

#include "backend/fake_device.h"
#include "util/error.h"

namespace pydiffusion {

Candidates StepBackend::candidates(const ggml_tensor* logits, int64_t n, int32_t k,
                                   const std::vector<int32_t>& extra) {
    Candidates found;
    std::vector<float> row(logits->ne[0]);
    for (int64_t t = 0; t < n; ++t) {
        ggml_backend_tensor_get(logits, row.data(), t * logits->nb[1], row.size() * sizeof(float));
        add_candidates(found, row.data(), logits->ne[0], k, extra);
    }
    return found;
}

namespace {

// The registry, one line each, by the name of ggml's registry of the devices.
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
    if (!step_backends().emplace(ggml_backend, make).second)
        throw Error(ErrorKind::argument,
                    "a StepBackend for " + quoted(ggml_backend) + " is registered already");
}

}  // namespace pydiffusion
