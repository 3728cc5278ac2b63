// A model: its file, hyperparameters, weights, and where they are computed. Shared by all sessions.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "backend/backend.h"
#include "gguf/gguf_file.h"
#include "model/device_plan.h"
#include "model/hparams.h"
#include "model/weights.h"

namespace pydiffusion {

struct Model {
    // device: see Backend; device_plan: what of the model lies on which. `read_ahead` is called with the
    // share of the file that has been brought into memory, 0 to 1. kernels: of the processor's products, see
    // gemm::kernel_by_name.
    Model(std::shared_ptr<const GgufFile> file, int n_threads, const std::string& device,
          const std::string& kernels, const DevicePlan& device_plan,
          const std::function<void(double)>& read_ahead);

    std::shared_ptr<const GgufFile> file;
    Hparams hparams;
    mutable Backend backend;
    DevicePlan device_plan;
    Weights weights;
};

}  // namespace pydiffusion
