#include "backend/graph_inputs.h"

#include "util/error.h"

namespace pydiffusion {

GraphInputs::GraphInputs(ggml_context* ctx, const Backend& backend, size_t n_inputs) : ctx_(ctx) {
    if (!backend.on_device()) return;
    for (int32_t device = kCpuDevice; device < backend.n_devices(); ++device) {
        contexts_.emplace_back(ggml_init({n_inputs * ggml_tensor_overhead(), nullptr, true}));
        if (!contexts_.back())
            throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate the inputs of a graph");
    }
}

ggml_tensor* GraphInputs::add(int32_t device, ggml_type type, int64_t n0, int64_t n1) {
    if (!contexts_.empty()) return ggml_new_tensor_2d(contexts_[device - kCpuDevice].get(), type, n0, n1);
    ggml_tensor* input = ggml_new_tensor_2d(ctx_, type, n0, n1);
    ggml_set_input(input);
    ggml_set_output(input);  // else the allocator reuses its memory after the last read
    return input;
}

}  // namespace pydiffusion
