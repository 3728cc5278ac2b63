#include "runtime/device_planner.h"

#include <algorithm>
#include <limits>
#include <string>

#include "backend/ops/ggml_attention.h"
#include "backend/step_backend.h"
#include "ggml-alloc.h"
#include "kv_cache/kv_layout.h"
#include "model/limits.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

// Sizes of tensors in a device's buffers, which may pad rows.
class TensorSizes {
  public:
    explicit TensorSizes(ggml_backend_buffer_type_t type) : type_(type) {}

    uint64_t of(ggml_type type, const std::vector<int64_t>& ne) const {
        const ggml_context_ptr context(ggml_init({ggml_tensor_overhead(), nullptr, true}));
        if (!context)
            throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate a tensor descriptor");
        ggml_new_tensor(context.get(), type, static_cast<int>(ne.size()), ne.data());
        return ggml_backend_alloc_ctx_tensors_from_buft_size(context.get(), type_);
    }

  private:
    ggml_backend_buffer_type_t type_;
};

uint64_t cache_bytes(const TensorSizes& sizes, const Hparams& hp, const LayerShape& shape,
                     const SessionNeeds& needs) {
    const int64_t n_rows =
        kv_rows(hp, shape.sliding, needs.n_ctx, max_batch(hp), needs.image_tokens) + ggml_ops::kMaskPadding;
    return 2 * sizes.of(needs.kv_type, {int64_t{shape.head_dim} * shape.n_head_kv, n_rows});
}

// Work buffers of one layer's attention. CUDA computes in float16 and converts caches of other types; float32
// goes through matmuls, with scores and weights of every head.
int64_t attention_bytes(const Hparams& hp, const LayerShape& shape, int64_t n_ctx, int64_t n_tokens,
                        ggml_type type) {
    const int64_t width = int64_t{shape.head_dim} * shape.n_head_kv;
    const int64_t n_rows = ggml_ops::pad_to_mask(kv_visible_rows(hp, shape.sliding, n_ctx, n_tokens));
    if (type == GGML_TYPE_F16) return 0;
    if (ggml_is_quantized(type)) return 2 * n_rows * width * static_cast<int64_t>(sizeof(ggml_fp16_t));
    return n_rows * (2 * hp.n_head * n_tokens + width) * static_cast<int64_t>(sizeof(float));
}

// Memory costs on one device, from which the use of any plan follows.
struct Costs {
    Costs(const GgufFile& file, const Hparams& hparams, bool dense_bf16, const SessionNeeds& needs,
          const TensorSizes& sizes);

    struct Layer {
        uint64_t weights = 0, experts = 0, cache = 0;
    };
    std::vector<Layer> layers;
    uint64_t outside = 0;           // weights of no layer
    uint64_t step = 0;              // on each device with a layer
    uint64_t main_device_step = 0;  // in addition, on the main device
};

Costs::Costs(const GgufFile& file, const Hparams& hp, bool dense_bf16, const SessionNeeds& needs,
             const TensorSizes& sizes)
    : layers(hp.layers.size()), outside(needs.vision_weights) {
    DevicePlan types;
    types.dense_bf16 = dense_bf16;
    uint64_t widened = 0;
    for (const TensorInfo& tensor : file.tensors()) {
        const int32_t i = layer_of_tensor(tensor.name);
        if (i >= hp.n_layer) continue;  // Weights refuses it
        uint64_t& sum = i < 0                           ? outside
                        : is_expert_tensor(tensor.name) ? layers[i].experts
                                                        : layers[i].weights;
        sum += sizes.of(types.device_type(tensor.name, tensor.type), tensor.ne);
        // CUDA converts a float16 matrix to float32 for float32 accumulation (see with_exact_sums).
        if (tensor.type == GGML_TYPE_F16 && tensor.ne.size() > 1)
            widened = std::max(widened, static_cast<uint64_t>(tensor.ne[0] * tensor.ne[1]) * sizeof(float));
    }
    const int64_t n_ctx = needs.n_ctx;
    // An image that is longer than the context is refused.
    const int64_t n_tokens = std::max<int64_t>(max_batch(hp), std::min(needs.usual_image_tokens, n_ctx));
    int64_t attention = 0;
    for (int32_t i = 0; i < hp.n_layer; ++i) {
        layers[i].cache = needs.n_sessions * cache_bytes(sizes, hp, hp.layers[i], needs);
        attention = std::max(attention, attention_bytes(hp, hp.layers[i], n_ctx, n_tokens, needs.kv_type));
    }
    // The largest tensors alive at the same time in a layer are the experts' activations.
    const int64_t of_experts = int64_t{hp.n_expert_used} * (3 * hp.n_ff_expert + 2 * hp.n_embd);
    const int64_t dense = 3 * int64_t{hp.n_ff} + 6 * hp.n_embd;
    const int64_t activations = n_tokens * (of_experts + dense) * static_cast<int64_t>(sizeof(float));
    const int64_t masks = 2 * n_tokens * n_ctx * static_cast<int64_t>(sizeof(ggml_fp16_t));
    step = needs.n_sessions * static_cast<uint64_t>(activations + attention + masks) + widened;

    const int64_t logits =
        int64_t{hp.canvas_length} * (hp.n_vocab + n_sums(hp.n_vocab) + hp.n_embd) * int64_t{sizeof(float)};
    const int64_t conditioning =  // double-buffered
        2 * kDenseRows * hp.n_embd * static_cast<int64_t>(sizeof(ggml_fp16_t));
    main_device_step = needs.n_sessions * static_cast<uint64_t>(logits) +
                       static_cast<uint64_t>(conditioning) + needs.vision_work;
}

// Per device: buffer types may pad tensors differently.
std::vector<Costs> costs_on(const GgufFile& file, const Hparams& hp, bool dense_bf16,
                            const SessionNeeds& needs, const std::vector<DeviceMemory>& memory) {
    std::vector<Costs> costs;
    for (const DeviceMemory& device : memory)
        costs.emplace_back(file, hp, dense_bf16, needs, TensorSizes(device.type));
    return costs;
}

std::vector<DeviceUse> use_of(const std::vector<Costs>& costs, const DevicePlan& device_plan) {
    std::vector<DeviceUse> uses(device_plan.device_layers.size());
    if (!device_plan.any()) return uses;
    for (int32_t i = 0; i < device_plan.n_layer; ++i) {
        const int32_t device = device_plan.layer_device(i);
        if (device == kCpuDevice) continue;
        const Costs::Layer& layer = costs[device].layers[i];
        uses[device].weights +=
            layer.weights + (device_plan.experts_device(i) == kCpuDevice ? 0 : layer.experts);
        uses[device].cache += layer.cache;
        uses[device].step = costs[device].step;
    }
    uses.back().weights += costs.back().outside;
    uses.back().step = costs.back().step + costs.back().main_device_step;
    return uses;
}

// Splits the last n_layers into one contiguous range per device so that the highest used fraction of a budget
// is minimal. Dynamic programming: fullest[k] is that fraction with the first k layers on the devices so far.
DevicePlan split_layers(const std::vector<Costs>& costs, const std::vector<DeviceMemory>& memory,
                        int32_t n_layers, int32_t n_experts) {
    const auto n_layer = static_cast<int32_t>(costs.front().layers.size());
    DevicePlan plan = {n_layer, std::vector<int32_t>(memory.size(), 0), n_experts};
    plan.device_layers.back() = n_layers;
    if (memory.size() < 2 || n_layers == 0) return plan;

    constexpr double kInfeasible = std::numeric_limits<double>::infinity();
    std::vector<std::vector<int32_t>> counts;  // layers of the last device in the best split
    std::vector<double> fullest(n_layers + 1, kInfeasible);
    fullest[0] = 0.0;
    for (size_t device = 0; device < memory.size(); ++device) {
        const Costs& here = costs[device];
        std::vector<double> bytes(n_layers + 1, 0.0);  // of the first k layers
        for (int32_t k = 0; k < n_layers; ++k) {
            const int32_t i = n_layer - n_layers + k;
            const Costs::Layer& layer = here.layers[i];
            bytes[k + 1] =
                bytes[k] + static_cast<double>(layer.weights + layer.cache +
                                               (plan.experts_device(i) == kCpuDevice ? 0 : layer.experts));
        }
        const bool main = device + 1 == memory.size();
        const double budget = static_cast<double>(memory[device].budget) - static_cast<double>(here.step) -
                              (main ? static_cast<double>(here.outside + here.main_device_step) : 0.0);
        std::vector<double> next(n_layers + 1, kInfeasible);
        counts.emplace_back(n_layers + 1, 0);
        for (int32_t k = 0; k <= n_layers; ++k) {
            for (int32_t count = 0; count <= k; ++count) {
                const double used = bytes[k] - bytes[k - count];
                const double own = count == 0 ? 0.0 : budget > 0.0 ? used / budget : kInfeasible;
                const double fraction = std::max(fullest[k - count], own);
                if (fraction < next[k]) {
                    next[k] = fraction;
                    counts.back()[k] = count;
                }
            }
        }
        fullest = next;
    }
    if (fullest[n_layers] == kInfeasible) return plan;
    for (int32_t device = static_cast<int32_t>(memory.size()) - 1, k = n_layers; device >= 0; --device) {
        plan.device_layers[device] = counts[device][k];
        k -= counts[device][k];
    }
    return plan;
}

bool fits(const std::vector<DeviceUse>& uses, const std::vector<DeviceMemory>& memory) {
    for (size_t i = 0; i < uses.size(); ++i) {
        if (uses[i].total() > memory[i].budget) return false;
    }
    return true;
}

[[noreturn]] void refuse(int32_t n_layers, const std::vector<DeviceUse>& uses,
                         const std::vector<DeviceMemory>& memory) {
    const auto gb = [](uint64_t n_bytes) { return static_cast<double>(n_bytes) / 1e9; };
    DeviceUse sum;
    std::string each;
    uint64_t budget = 0, reserved = 0;
    for (size_t i = 0; i < uses.size(); ++i) {
        sum.weights += uses[i].weights;
        sum.cache += uses[i].cache;
        sum.step += uses[i].step;
        budget += std::min(memory[i].budget, std::numeric_limits<uint64_t>::max() - budget);
        reserved += memory[i].reserved;
        each += format("%s%.2f of %.2f", i ? ", " : "", gb(uses[i].total()), gb(memory[i].budget));
    }
    const bool several = uses.size() > 1;
    throw Error(
        ErrorKind::out_of_memory,
        format("out of memory: %d layers on the device%s need %.2f GB (weights %.2f, cache %.2f, step "
               "%.2f), but only %.2f GB are available%s, with another %.2f GB kept free: use fewer "
               "layers (n_gpu_layers), more experts on the CPU (n_cpu_moe), a shorter context, or "
               "\"auto\"",
               n_layers, several ? "s" : "", gb(sum.total()), gb(sum.weights), gb(sum.cache), gb(sum.step),
               gb(budget), several ? (" (" + each + ")").c_str() : "", gb(reserved)));
}

// The plan whose matrices other than experts have these costs.
DevicePlan best_plan(const std::vector<Costs>& costs, const Hparams& hp,
                     const std::vector<DeviceMemory>& memory, int32_t n_gpu_layers, int32_t n_cpu_moe) {
    std::vector<DeviceUse> uses;
    const int32_t most = n_gpu_layers >= 0 ? std::min(n_gpu_layers, hp.n_layer) : hp.n_layer;
    const int32_t least = n_gpu_layers >= 0 ? most : 0;
    for (int32_t n_layers = most; n_layers >= least; --n_layers) {
        // Experts have the most bytes for the least work, so leave them on the CPU first.
        const int32_t first = n_cpu_moe >= 0 ? std::min(n_cpu_moe, n_layers) : 0;
        const int32_t last = n_cpu_moe >= 0 ? first : n_layers;
        for (int32_t n_experts = first; n_experts <= last; ++n_experts) {
            const DevicePlan plan = split_layers(costs, memory, n_layers, n_experts);
            uses = use_of(costs, plan);
            if (fits(uses, memory)) return plan;
        }
    }
    if (n_gpu_layers >= 0 && most > 0) refuse(most, uses, memory);
    return {hp.n_layer, {}, 0};
}

// A file without quantized matrices stays as it is, so that its plan does not claim another type.
bool has_quantized_matrices(const GgufFile& file) {
    return std::any_of(file.tensors().begin(), file.tensors().end(), [](const TensorInfo& tensor) {
        return ggml_is_quantized(tensor.type) && !is_expert_tensor(tensor.name);
    });
}

}  // namespace

constexpr uint64_t kLeastReserve = uint64_t{512} << 20;
constexpr uint64_t kReservedPart = 20;  // one of so many parts of the device's memory

uint64_t reserved_bytes(uint64_t free_bytes, uint64_t total_bytes) {
    return std::min(free_bytes, std::max(kLeastReserve, total_bytes / kReservedPart));
}

uint64_t smallest_device(uint64_t n_bytes) {
    return n_bytes + std::max(kLeastReserve, n_bytes / (kReservedPart - 1));
}

std::vector<DeviceUse> device_use(const GgufFile& file, const Hparams& hp, const DevicePlan& device_plan,
                                  const SessionNeeds& needs, const std::vector<DeviceMemory>& memory) {
    return use_of(costs_on(file, hp, device_plan.dense_bf16, needs, memory), device_plan);
}

DevicePlan plan_devices(const GgufFile& file, const Hparams& hp, const SessionNeeds& needs,
                        const std::vector<DeviceMemory>& memory, int32_t n_gpu_layers, int32_t n_cpu_moe,
                        DenseType dense_type) {
    require_fitting_heads(hp, needs.kv_type);
    const auto plan_with = [&](bool dense_bf16) {
        DevicePlan plan =
            best_plan(costs_on(file, hp, dense_bf16, needs, memory), hp, memory, n_gpu_layers, n_cpu_moe);
        plan.dense_bf16 = dense_bf16 && plan.any();
        return plan;
    };
    if (dense_type == DenseType::file || !has_quantized_matrices(file)) return plan_with(false);
    if (dense_type == DenseType::bf16) return plan_with(true);
    const DevicePlan plan = plan_with(false);
    if (plan.n_gpu_layers() < hp.n_layer || plan.n_cpu_moe > 0) return plan;
    const std::vector<Costs> costs = costs_on(file, hp, true, needs, memory);
    DevicePlan wide = split_layers(costs, memory, hp.n_layer, 0);
    wide.dense_bf16 = true;
    bool fast = true;  // on all devices that the plan uses
    for (size_t i = 0; i < memory.size(); ++i)
        fast = fast && (memory[i].fast_bf16 || (wide.device_layers[i] == 0 && i + 1 < memory.size()));
    return fast && fits(use_of(costs, wide), memory) ? wide : plan;
}

}  // namespace pydiffusion
