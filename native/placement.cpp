#include "placement.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>

#include "encoder.h"
#include "errors.h"
#include "portable_ops.h"

namespace pydiffusion {

namespace {

bool is_of_experts(const std::string& name) { return name.find("_exps.weight") != std::string::npos; }

// The number of the layer that a tensor belongs to; -1 for one in none.
int32_t layer_of(const std::string& name) {
    if (name.rfind("blk.", 0) != 0) return -1;
    const long i = std::strtol(name.c_str() + std::strlen("blk."), nullptr, 10);
    return static_cast<int32_t>(std::min<long>(std::max<long>(i, -1), std::numeric_limits<int32_t>::max()));
}

}  // namespace

int32_t Placement::n_device_layers() const {
    return std::accumulate(device_layers.begin(), device_layers.end(), 0);
}

bool Placement::one_place() const {
    return n_host_experts == 0 && (!any() || (device_layers.size() == 1 && device_layers[0] == n_layer));
}

int32_t Placement::layer(int32_t i) const {
    int32_t first = n_layer - n_device_layers();
    if (i < first) return kProcessor;
    for (size_t device = 0; device < device_layers.size(); ++device) {
        first += device_layers[device];
        if (i < first) return static_cast<int32_t>(device);
    }
    return kProcessor;
}

int32_t Placement::tensor(const std::string& name) const {
    const int32_t i = layer_of(name);
    return i < 0 ? home() : is_of_experts(name) ? experts(i) : layer(i);
}

namespace {

uint64_t cache_bytes(const Hyperparameters& hp, const LayerShape& shape, int64_t n_ctx, ggml_type type) {
    const int64_t n_rows =
        KvCache::n_rows(hp, shape.sliding, n_ctx, std::max(kEncodeChunk, hp.canvas_length)) +
        portable::kRowStep;
    return 2 * n_rows * ggml_row_size(type, int64_t{shape.head_dim} * shape.n_head_kv);
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

// Bytes by what takes them, from which the use of any placement follows.
struct Costs {
    Costs(const File& file, const Hyperparameters& hparams, int64_t n_ctx, ggml_type kv_type);

    struct Layer {
        uint64_t weights = 0, experts = 0, cache = 0;
    };
    std::vector<Layer> layers;
    uint64_t outside = 0;    // weights in no layer
    uint64_t step = 0;       // on every device
    uint64_t home_step = 0;  // on the one that embeds and samples

    std::vector<DeviceUse> use(const Placement& placement) const;
};

Costs::Costs(const File& file, const Hyperparameters& hp, int64_t n_ctx, ggml_type kv_type)
    : layers(hp.layers.size()) {
    for (const TensorInfo& tensor : file.tensors()) {
        const int32_t i = layer_of(tensor.name);
        if (i >= hp.n_layer) continue;  // refused when it is loaded
        uint64_t& sum = i < 0 ? outside : is_of_experts(tensor.name) ? layers[i].experts : layers[i].weights;
        sum += tensor.n_bytes;
    }
    const int64_t n_tokens = std::max(kEncodeChunk, hp.canvas_length);
    int64_t attention = 0;
    for (int32_t i = 0; i < hp.n_layer; ++i) {
        layers[i].cache = cache_bytes(hp, hp.layers[i], n_ctx, kv_type);
        attention = std::max(attention, attention_bytes(hp, hp.layers[i], n_ctx, n_tokens, kv_type));
    }
    // The largest tensors that live at the same time in a layer: the experts' for each token.
    const int64_t of_experts = int64_t{hp.n_expert_used} * (3 * hp.n_ff_expert + 2 * hp.n_embd);
    const int64_t dense = 3 * int64_t{hp.n_ff} + 6 * hp.n_embd;
    const int64_t activations = n_tokens * (of_experts + dense) * static_cast<int64_t>(sizeof(float));
    const int64_t masks = 2 * n_tokens * n_ctx * static_cast<int64_t>(sizeof(ggml_fp16_t));
    constexpr int64_t kRuntime = int64_t{64} << 20;  // cuBLAS's work area, kernels' code
    step = static_cast<uint64_t>(activations + attention + masks + kRuntime);

    const int64_t logits =
        int64_t{hp.canvas_length} * (hp.n_vocab + hp.n_embd) * static_cast<int64_t>(sizeof(float));
    constexpr int64_t kSelfConditioningRows = 8192;  // of the embedding, as float16: see the kernels
    const int64_t conditioning =
        2 * kSelfConditioningRows * hp.n_embd * static_cast<int64_t>(sizeof(ggml_fp16_t));
    home_step = static_cast<uint64_t>(logits + conditioning);
}

std::vector<DeviceUse> Costs::use(const Placement& placement) const {
    std::vector<DeviceUse> uses(placement.device_layers.size());
    if (!placement.any()) return uses;
    for (int32_t i = 0; i < placement.n_layer; ++i) {
        const int32_t device = placement.layer(i);
        if (device == kProcessor) continue;
        uses[device].weights +=
            layers[i].weights + (placement.experts(i) == kProcessor ? 0 : layers[i].experts);
        uses[device].cache += layers[i].cache;
        uses[device].step = step;
    }
    uses.back().weights += outside;
    uses.back().step = step + home_step;
    return uses;
}

// Shares the last n_layers out to devices, one run each, so that the share of its room that the fullest one
// fills is as small as can be. In fullest[k]: that share where the devices so far hold the first k layers.
Placement shared_out(const Costs& costs, const std::vector<uint64_t>& free_bytes, int32_t n_layers,
                     int32_t n_experts) {
    const auto n_layer = static_cast<int32_t>(costs.layers.size());
    Placement plan = {n_layer, std::vector<int32_t>(free_bytes.size(), 0), n_experts};
    plan.device_layers.back() = n_layers;
    if (free_bytes.size() < 2 || n_layers == 0) return plan;

    constexpr double kNever = std::numeric_limits<double>::infinity();
    std::vector<double> before(n_layers + 1, 0.0);  // bytes of the first k
    for (int32_t k = 0; k < n_layers; ++k) {
        const int32_t i = n_layer - n_layers + k;
        const Costs::Layer& layer = costs.layers[i];
        before[k + 1] = before[k] + static_cast<double>(layer.weights + layer.cache +
                                                        (plan.experts(i) == kProcessor ? 0 : layer.experts));
    }
    std::vector<std::vector<int32_t>> runs;  // how many layers the last device of the best sharing has
    std::vector<double> fullest(n_layers + 1, kNever);
    fullest[0] = 0.0;
    for (size_t device = 0; device < free_bytes.size(); ++device) {
        const bool home = device + 1 == free_bytes.size();
        const double room = static_cast<double>(free_bytes[device]) - static_cast<double>(costs.step) -
                            (home ? static_cast<double>(costs.outside + costs.home_step) : 0.0);
        std::vector<double> next(n_layers + 1, kNever);
        runs.emplace_back(n_layers + 1, 0);
        for (int32_t k = 0; k <= n_layers; ++k) {
            for (int32_t run = 0; run <= k; ++run) {
                const double bytes = before[k] - before[k - run];
                const double own = run == 0 ? 0.0 : room > 0.0 ? bytes / room : kNever;
                const double share = std::max(fullest[k - run], own);
                if (share < next[k]) {
                    next[k] = share;
                    runs.back()[k] = run;
                }
            }
        }
        fullest = next;
    }
    if (fullest[n_layers] == kNever) return plan;  // no way fits
    for (int32_t device = static_cast<int32_t>(free_bytes.size()) - 1, k = n_layers; device >= 0; --device) {
        plan.device_layers[device] = runs[device][k];
        k -= runs[device][k];
    }
    return plan;
}

bool fits(const std::vector<DeviceUse>& uses, const std::vector<uint64_t>& free_bytes) {
    for (size_t i = 0; i < uses.size(); ++i) {
        if (uses[i].total() > free_bytes[i]) return false;
    }
    return true;
}

[[noreturn]] void refuse(int32_t n_layers, const std::vector<DeviceUse>& uses,
                         const std::vector<uint64_t>& free_bytes) {
    const auto gb = [](uint64_t n_bytes) { return static_cast<double>(n_bytes) / 1e9; };
    DeviceUse sum;
    std::string each;
    uint64_t free = 0;
    for (size_t i = 0; i < uses.size(); ++i) {
        sum.weights += uses[i].weights;
        sum.cache += uses[i].cache;
        sum.step += uses[i].step;
        free += std::min(free_bytes[i], std::numeric_limits<uint64_t>::max() - free);
        each += format("%s%.2f of %.2f", i ? ", " : "", gb(uses[i].total()), gb(free_bytes[i]));
    }
    const bool several = uses.size() > 1;
    throw Error(ErrorKind::out_of_memory,
                format("%d layers on the device%s need %.2f GB (weights %.2f, cache %.2f, step %.2f), and "
                       "%.2f GB are free%s: choose fewer layers, more experts on the processor "
                       "(n_cpu_moe), a shorter context, or \"auto\"",
                       n_layers, several ? "s" : "", gb(sum.total()), gb(sum.weights), gb(sum.cache),
                       gb(sum.step), gb(free), several ? (" (" + each + ")").c_str() : ""));
}

}  // namespace

std::vector<DeviceUse> device_use(const File& file, const Hyperparameters& hp, const Placement& placement,
                                  int64_t n_ctx, ggml_type kv_type) {
    return Costs(file, hp, n_ctx, kv_type).use(placement);
}

Placement plan_placement(const File& file, const Hyperparameters& hp, int64_t n_ctx, ggml_type kv_type,
                         const std::vector<uint64_t>& free_bytes, int32_t n_device_layers,
                         int32_t n_host_experts) {
    KvCache::require_fitting_heads(hp, kv_type);
    const Costs costs(file, hp, n_ctx, kv_type);
    std::vector<DeviceUse> uses;
    const int32_t most = n_device_layers >= 0 ? std::min(n_device_layers, hp.n_layer) : hp.n_layer;
    const int32_t least = n_device_layers >= 0 ? most : 0;
    for (int32_t n_layers = most; n_layers >= least; --n_layers) {
        // Experts are the most bytes for the least work: they stay behind first.
        const int32_t first = n_host_experts >= 0 ? std::min(n_host_experts, n_layers) : 0;
        const int32_t last = n_host_experts >= 0 ? first : n_layers;
        for (int32_t n_experts = first; n_experts <= last; ++n_experts) {
            const Placement plan = shared_out(costs, free_bytes, n_layers, n_experts);
            uses = costs.use(plan);
            if (fits(uses, free_bytes)) return plan;
        }
    }
    if (n_device_layers >= 0 && most > 0) refuse(most, uses, free_bytes);
    return {hp.n_layer, {}, 0};
}

}  // namespace pydiffusion
