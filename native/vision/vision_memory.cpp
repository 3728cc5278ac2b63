#include "vision/vision_memory.h"

#include <algorithm>

#include "ggml-cpp.h"
#include "util/error.h"
#include "vision/vision_weights.h"

namespace pydiffusion {

namespace {

uint64_t weight_bytes(const GgufFile& file, ggml_backend_buffer_type_t type) {
    const size_t n = file.tensors().size();
    const ggml_context_ptr context(ggml_init({(n + 1) * ggml_tensor_overhead(), nullptr, true}));
    if (!context)
        throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate the tensor descriptors");
    for (const TensorInfo& tensor : file.tensors()) {
        if (is_audio(tensor.name)) continue;
        ggml_new_tensor(context.get(), tensor.type, static_cast<int>(tensor.ne.size()), tensor.ne.data());
    }
    return ggml_backend_alloc_ctx_tensors_from_buft_size(context.get(), type);
}

}  // namespace

VisionMemory vision_memory(const GgufFile& file, const VisionHparams& hp, ggml_backend_buffer_type_t type) {
    const auto n = static_cast<uint64_t>(hp.max_soft_tokens * hp.pooled_patches());
    const auto d = static_cast<uint64_t>(hp.n_embd), ff = static_cast<uint64_t>(hp.n_ff),
               heads = static_cast<uint64_t>(hp.n_head) * hp.head_dim;
    // The most that is alive at the same time in a layer: Q, K and V before and after norms and rotation, or
    // gate, up and the activation.
    const uint64_t in_layer = std::max(2 * d + 7 * heads, 3 * d + 3 * ff);
    VisionMemory memory = {weight_bytes(file, type), n * in_layer * sizeof(float)};
    memory.work = std::max(memory.work, n * (hp.patch_elements() + 3 * d) * sizeof(float));
    bool exact = true;
    uint64_t widened = 0;  // CUDA converts a float16 matrix to float32
    for (const TensorInfo& tensor : file.tensors()) {
        if (is_audio(tensor.name)) continue;
        exact = exact && tensor.type == GGML_TYPE_F32;
        if (tensor.type == GGML_TYPE_F16 && tensor.ne.size() == 2)
            widened = std::max<uint64_t>(widened, tensor.n_elements() * sizeof(float));
    }
    if (exact) memory.work += 2 * n * n * hp.n_head * sizeof(float);  // scores and weights of attention
    memory.work += widened;
    return memory;
}

}  // namespace pydiffusion
