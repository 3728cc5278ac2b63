// GraphInputs: the input tensors of a graph, written before a run and kept until the next write.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "ggml-cpp.h"

namespace pydiffusion {

class GraphInputs {
  public:
    // n_inputs: most that any one device may get. ctx: of the graph, which must not run once its inputs are
    // gone.
    GraphInputs(ggml_context* ctx, const Backend& backend, size_t n_inputs);

    // A tensor [n0, n1] in the memory of a device of the backend or of kCpuDevice. Without devices all of
    // them are in the graph's own memory.
    ggml_tensor* add(int32_t device, ggml_type type, int64_t n0, int64_t n1 = 1);

    // The CPU's, then each device's; empty without devices.
    const std::vector<ggml_context_ptr>& contexts() const { return contexts_; }

  private:
    ggml_context* ctx_;
    std::vector<ggml_context_ptr> contexts_;
};

}  // namespace pydiffusion
