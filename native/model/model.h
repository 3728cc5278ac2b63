// A loaded model: file, hyperparameters, backend, device plan and weights. Shared by all sessions.
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
    // device: see Backend. kernels: of the CPU's matmuls, see gemm::kernel_by_name. `progress` is called with
    // the fraction of the file loaded so far, 0 to 1.
    Model(std::shared_ptr<const GgufFile> file, int n_threads, const std::string& device,
          const std::string& kernels, const DevicePlan& device_plan,
          const std::function<void(double)>& progress);

    std::shared_ptr<const GgufFile> file;
    Hparams hparams;
    mutable Backend backend;
    DevicePlan device_plan;
    Weights weights;

    // Of embedded tokens and of the soft embedding.
    float embedding_scale() const { return hparams.embedding_scale * weights.token_embd.scale; }
};

// Touches every page once, in order: a cold file is then read sequentially, with progress, instead of by
// page faults during the first step.
void read_into_memory(const GgufFile& file, const std::function<void(double)>& progress);

}  // namespace pydiffusion
