#include "vision/vision_hparams.h"

#include <algorithm>
#include <cmath>

#include "model/key_reader.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

constexpr char kProjector[] = "gemma4v";

[[noreturn]] void refuse_file(const GgufFile& file, const std::string& what) {
    throw Error(ErrorKind::unsupported, file.path() + ": " + what);
}

// Files with a single encoder may have the projector's type without "vision".
void require_projector(const GgufFile& file, const KeyReader& keys) {
    const std::string architecture = keys.text("general.architecture");
    if (architecture != "clip")
        refuse_file(file, "is not the vision part of a model (mmproj): its architecture is " +
                              quoted(architecture) + ", not 'clip'");
    if (keys.has("clip.has_vision_encoder") && keys.integer("clip.has_vision_encoder", 0, 1) == 0)
        refuse_file(file, "has no vision encoder (key 'clip.has_vision_encoder')");
    const char* key =
        keys.has("clip.vision.projector_type") ? "clip.vision.projector_type" : "clip.projector_type";
    const std::string projector = keys.text(key);
    if (projector != kProjector)
        refuse_file(file, "key " + quoted(key) + " is " + quoted(projector) + ": only " + quoted(kProjector) +
                              " is supported");
    // Without a key readers take the activation for granted, as the reference's configuration does.
    if (keys.has("clip.use_silu") && keys.integer("clip.use_silu", 0, 1) == 1)
        keys.unsupported("clip.use_silu", "is true: only GELU is supported");
}

std::array<float, kChannels> read_channels(const KeyReader& keys, const std::string& key, float fallback,
                                           double low) {
    std::array<float, kChannels> channels;
    channels.fill(fallback);
    if (!keys.has(key)) return channels;
    const Value& value = keys.require(key);
    if (value.floats.size() != kChannels)
        keys.refuse(key, format("must be an array of %d floats, but is %s of %zu", kChannels,
                                value.type_name().c_str(), value.array_length()));
    for (size_t i = 0; i < channels.size(); ++i) {
        if (!(value.floats[i] >= low && value.floats[i] <= 1e3))  // NaN fails too
            keys.refuse(key, format("holds %g; it must be %g to 1000", value.floats[i], low));
        channels[i] = static_cast<float>(value.floats[i]);
    }
    return channels;
}

// Dimension of a tensor that has this many; within 1 to `high`.
int32_t read_dimension(const GgufFile& file, const std::string& name, size_t n_dims, size_t i, int64_t high) {
    const TensorInfo* tensor = file.find_tensor(name);
    if (!tensor) throw Error(ErrorKind::format, file.path() + ": tensor " + quoted(name) + " is missing");
    if (tensor->ne.size() > n_dims || tensor->dimension(i) < 1 || tensor->dimension(i) > high)
        throw Error(ErrorKind::format,
                    file.path() + ": tensor " + quoted(name) + " has the invalid shape " + tensor->shape());
    return static_cast<int32_t>(tensor->dimension(i));
}

}  // namespace

VisionHparams::VisionHparams(const GgufFile& file) {
    const KeyReader keys(file, "clip.vision");
    require_projector(file, keys);
    name = keys.has("general.name") ? keys.text("general.name") : "";
    n_layer = keys.integer(keys.own("block_count"), 1, 1024);
    n_embd = keys.integer(keys.own("embedding_length"), 1, 1 << 20);
    n_ff = keys.integer(keys.own("feed_forward_length"), 1, 1 << 20);
    n_head = keys.integer(keys.own("attention.head_count"), 1, 4096);
    patch_size = keys.integer(keys.own("patch_size"), 1, 256);
    pooling = keys.integer_or(keys.own("projector.scale_factor"), 3, 1, 64);
    max_soft_tokens = keys.integer_or(keys.own("max_soft_tokens"), 280, 1, kMaxSoftTokens);
    // Images are enlarged to about as many.
    const int64_t n_patches = max_soft_tokens * pooled_patches();
    if (n_patches > kMaxPatches || n_patches * patch_size * patch_size > kMaxPixels)
        keys.refuse(keys.own("max_soft_tokens"),
                    format("is %d, but that many of %d x %d patches with %d x %d pixels are too many",
                           max_soft_tokens, pooling, pooling, patch_size, patch_size));
    projection_dim = keys.integer(keys.own("projection_dim"), 1, 1 << 20);
    rms_eps = keys.number(keys.own("attention.layer_norm_epsilon"), 1e-12, 1);
    rope_theta = keys.number_or(keys.own("rope.freq_base"), 100.0f, 1, 1e9);
    mean = read_channels(keys, keys.own("image_mean"), 0.0f, -1e3);
    std = read_channels(keys, keys.own("image_std"), 1.0f, 1e-6);
    n_positions = read_dimension(file, "v.position_embd.weight", 3, 1, 1 << 24);
    // No key has it: the reference's configuration has a head size besides the number of heads.
    head_dim = read_dimension(file, "v.blk.0.attn_q_norm.weight", 1, 0, 1024);
    if (head_dim % 4 != 0)
        throw Error(ErrorKind::unsupported,
                    format("%s: heads have %d elements; rotating them by two positions takes a multiple of 4",
                           file.path().c_str(), head_dim));
    standardize = file.find_tensor("v.std_bias") || file.find_tensor("v.std_scale");
    clipped = std::any_of(file.tensors().begin(), file.tensors().end(), [](const TensorInfo& tensor) {
        return tensor.name.rfind("v.blk.", 0) == 0 && tensor.name.find("put_m") != std::string::npos;
    });
}

void VisionHparams::require_size(const GgufFile& file, int32_t n_embd_of_text) const {
    if (projection_dim != n_embd_of_text)
        refuse_file(file,
                    format("is the vision part of another model: its features have %d elements, but the "
                           "model's embeddings have %d",
                           projection_dim, n_embd_of_text));
}

bool VisionHparams::normalizes() const {
    return std::any_of(mean.begin(), mean.end(), [](float x) { return x != 0.0f; }) ||
           std::any_of(std.begin(), std.end(), [](float x) { return x != 1.0f; });
}

}  // namespace pydiffusion
