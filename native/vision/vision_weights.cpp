#include "vision/vision_weights.h"

#include <cmath>

#include "model/weights_loader.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

// Loads the tensors of one file.
class Loader {
  public:
    Loader(LoadedTensors& tensors, const GgufFile& file, const VisionHparams& hparams,
           const DevicePlan& device_plan, const Backend& backend)
        : file_(file), hp_(hparams), load_(tensors, file, device_plan, backend) {}

    WeightsLoader& all() { return load_; }

    VisionLayer layer(int32_t i) {
        const int64_t d = hp_.n_embd, n = int64_t{hp_.n_head} * hp_.head_dim, ff = hp_.n_ff;
        const auto name = [i](const char* suffix) { return format("v.blk.%d.%s", i, suffix); };
        VisionLayer w;
        w.ln1 = load_.f32(name("ln1.weight"), {d});
        w.attn_q = matrix(name("attn_q"), {d, n});
        w.attn_k = matrix(name("attn_k"), {d, n});
        w.attn_v = matrix(name("attn_v"), {d, n});
        w.attn_q_norm = load_.f32(name("attn_q_norm.weight"), {hp_.head_dim});
        w.attn_k_norm = load_.f32(name("attn_k_norm.weight"), {hp_.head_dim});
        w.attn_out = matrix(name("attn_out"), {n, d});
        w.attn_post_norm = load_.f32(name("attn_post_norm.weight"), {d});
        w.ln2 = load_.f32(name("ln2.weight"), {d});
        w.ffn_gate = matrix(name("ffn_gate"), {d, ff});
        w.ffn_up = matrix(name("ffn_up"), {d, ff});
        w.ffn_down = matrix(name("ffn_down"), {ff, d});
        w.ffn_post_norm = load_.f32(name("ffn_post_norm.weight"), {d});
        return w;
    }

    // Values [d] that the host computes with.
    std::vector<float> vector(const std::string& name) {
        load_.f32_on(kCpuDevice, name, {hp_.n_embd});
        return load_.values(name);
    }

  private:
    ClippedMatrix matrix(const std::string& name, const Shape& shape) {
        return {load_.matrix(name + ".weight", shape), bounds(name + ".input"), bounds(name + ".output")};
    }

    Bounds bounds(const std::string& name) {
        Bounds bounds;
        read_bound(name + "_min", bounds.low);
        read_bound(name + "_max", bounds.high);
        if (!(bounds.low <= bounds.high))
            throw Error(ErrorKind::format, file_.path() + format(": the bounds %s_min and _max are %g and %g",
                                                                 name.c_str(), bounds.low, bounds.high));
        return bounds;
    }

    void read_bound(const std::string& name, float& bound) {
        if (!load_.has(name)) return;
        load_.f32_on(kCpuDevice, name, {1});
        bound = load_.values(name)[0];
        if (std::isnan(bound))
            throw Error(ErrorKind::format, file_.path() + ": tensor " + quoted(name) + " is NaN");
    }

    const GgufFile& file_;
    const VisionHparams& hp_;
    WeightsLoader load_;
};

// The plan may have the text model's quantized matrices as BF16. It counts the tower as it is in the file
// (see vision_memory.h): BF16 would take memory that is not in the plan.
DevicePlan with_types_of_file(DevicePlan plan) {
    plan.dense_bf16 = false;
    return plan;
}

}  // namespace

bool is_audio(const std::string& name) { return name.rfind("a.", 0) == 0 || name.rfind("mm.a.", 0) == 0; }

VisionWeights::VisionWeights(const std::shared_ptr<const GgufFile>& file, const VisionHparams& hp,
                             const DevicePlan& device_plan, const Backend& backend,
                             const std::function<void(double)>& progress)
    : LoadedTensors(file) {
    const DevicePlan own_plan = with_types_of_file(device_plan);
    Loader loader(*this, *file, hp, own_plan, backend);
    WeightsLoader& load = loader.all();
    const int64_t d = hp.n_embd;
    patch_embd = load.tensor("v.patch_embd.weight", {hp.patch_size, hp.patch_size, kChannels, d});
    position_embd = load.tensor("v.position_embd.weight", {d, hp.n_positions, 2});
    for (int32_t i = 0; i < hp.n_layer; ++i) layers.push_back(loader.layer(i));
    if (hp.standardize) {
        std_bias = loader.vector("v.std_bias");
        std_scale = loader.vector("v.std_scale");
    }
    projection = load.matrix("mm.input_projection.weight", {d, hp.projection_dim});
    for (const TensorInfo& tensor : file->tensors()) {
        if (!find(tensor.name) && !load.is_input_scale(tensor.name) && !is_audio(tensor.name))
            throw Error(ErrorKind::unsupported, file->path() + ": tensor " + quoted(tensor.name) +
                                                    " is not part of this vision tower");
    }
    exact = bytes_by_type.size() == 1 && bytes_by_type.count(GGML_TYPE_F32) == 1;
    load.upload(progress);
}

}  // namespace pydiffusion
