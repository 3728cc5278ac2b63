#include "placement.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "encoder.h"
#include "errors.h"
#include "portable_ops.h"

namespace pydiffusion {

bool Placement::tensor(const std::string& name) const {
    if (name.rfind("blk.", 0) != 0) return any();
    const int32_t i = std::atoi(name.c_str() + std::strlen("blk."));
    const bool of_experts = name.find("_exps.weight") != std::string::npos;
    return of_experts ? experts(i) : layer(i);
}

namespace {

uint64_t cache_bytes(const Hyperparameters& hp, const Placement& placement, int64_t n_ctx, ggml_type type) {
    uint64_t n_bytes = 0;
    for (int32_t i = 0; i < hp.n_layer; ++i) {
        if (!placement.layer(i)) continue;
        const LayerShape& shape = hp.layers[i];
        const int64_t n_rows =
            KvCache::n_rows(hp, shape.sliding, n_ctx, std::max(kEncodeChunk, hp.canvas_length)) +
            portable::kRowStep;
        n_bytes += 2 * n_rows * ggml_row_size(type, int64_t{shape.head_dim} * shape.n_head_kv);
    }
    return n_bytes;
}

// What the attention of one layer works with beside its inputs: CUDA's multiplies in float16, and copies what
// a cache of another type holds; float32 goes through products, with scores and weights of every head.
int64_t attention_bytes(const Hyperparameters& hp, const LayerShape& shape, int64_t n_ctx, int64_t n_tokens,
                        ggml_type type) {
    const int64_t width = int64_t{shape.head_dim} * shape.n_head_kv;
    const int64_t n_rows = portable::filled_up(shape.sliding ? std::min(n_ctx, hp.window + n_tokens) : n_ctx);
    if (type == GGML_TYPE_F16) return 0;
    if (ggml_is_quantized(type)) return 2 * n_rows * width * static_cast<int64_t>(sizeof(ggml_fp16_t));
    return n_rows * (2 * hp.n_head * n_tokens + width) * static_cast<int64_t>(sizeof(float));
}

// What the largest tensors that live at the same time in a layer take: the experts' for each token.
uint64_t step_bytes(const Hyperparameters& hp, int64_t n_ctx, ggml_type kv_type) {
    const int64_t n_tokens = std::max(kEncodeChunk, hp.canvas_length);
    int64_t attention = 0;
    for (const LayerShape& shape : hp.layers)
        attention = std::max(attention, attention_bytes(hp, shape, n_ctx, n_tokens, kv_type));
    const int64_t experts = int64_t{hp.n_expert_used} * (3 * hp.n_ff_expert + 2 * hp.n_embd);
    const int64_t dense = 3 * int64_t{hp.n_ff} + 6 * hp.n_embd;
    const int64_t activations = n_tokens * (experts + dense) * static_cast<int64_t>(sizeof(float));
    const int64_t masks = 2 * n_tokens * n_ctx * static_cast<int64_t>(sizeof(ggml_fp16_t));
    const int64_t logits =
        int64_t{hp.canvas_length} * (hp.n_vocab + hp.n_embd) * static_cast<int64_t>(sizeof(float));
    constexpr int64_t kSelfConditioningRows = 8192;  // of the embedding, as float16: see the kernels
    const int64_t conditioning =
        2 * kSelfConditioningRows * hp.n_embd * static_cast<int64_t>(sizeof(ggml_fp16_t));
    constexpr int64_t kRuntime = int64_t{64} << 20;  // cuBLAS's work area, kernels' code
    return static_cast<uint64_t>(activations + attention + masks + logits + conditioning + kRuntime);
}

}  // namespace

DeviceUse device_use(const File& file, const Hyperparameters& hp, const Placement& placement, int64_t n_ctx,
                     ggml_type kv_type) {
    DeviceUse use;
    if (!placement.any()) return use;
    for (const TensorInfo& tensor : file.tensors()) {
        if (placement.tensor(tensor.name)) use.weights += tensor.n_bytes;
    }
    use.cache = cache_bytes(hp, placement, n_ctx, kv_type);
    use.step = step_bytes(hp, n_ctx, kv_type);
    return use;
}

Placement plan_placement(const File& file, const Hyperparameters& hp, int64_t n_ctx, ggml_type kv_type,
                         uint64_t free_bytes, int32_t n_device_layers, int32_t n_host_experts) {
    KvCache::require_fitting_heads(hp, kv_type);
    const auto fits = [&](int32_t n_layers, int32_t n_experts, Placement& plan) {
        plan = {hp.n_layer, n_layers, n_experts};
        return device_use(file, hp, plan, n_ctx, kv_type).total() <= free_bytes;
    };
    Placement plan;
    const int32_t most = n_device_layers >= 0 ? std::min(n_device_layers, hp.n_layer) : hp.n_layer;
    const int32_t least = n_device_layers >= 0 ? most : 0;
    for (int32_t n_layers = most; n_layers >= least; --n_layers) {
        // Experts are the most bytes for the least work: they stay behind first.
        const int32_t first = n_host_experts >= 0 ? std::min(n_host_experts, n_layers) : 0;
        const int32_t last = n_host_experts >= 0 ? first : n_layers;
        for (int32_t n_experts = first; n_experts <= last; ++n_experts) {
            if (fits(n_layers, n_experts, plan)) return plan;
        }
    }
    if (n_device_layers >= 0 && most > 0) {
        const DeviceUse use = device_use(file, hp, plan, n_ctx, kv_type);
        throw Error(ErrorKind::out_of_memory,
                    format("%d layers on the device need %.2f GB (weights %.2f, cache %.2f, step %.2f), and "
                           "%.2f GB are free: choose fewer layers, more experts on the processor "
                           "(n_cpu_moe), a shorter context, or \"auto\"",
                           most, static_cast<double>(use.total()) / 1e9,
                           static_cast<double>(use.weights) / 1e9, static_cast<double>(use.cache) / 1e9,
                           static_cast<double>(use.step) / 1e9, static_cast<double>(free_bytes) / 1e9));
    }
    return {hp.n_layer, 0, 0};
}

}  // namespace pydiffusion
