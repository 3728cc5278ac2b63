// Weights of a vision tower and its projector, on the CPU or on the main device of the text model.
#pragma once

#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "model/weights.h"
#include "vision/vision_hparams.h"

namespace pydiffusion {

// Limits of activations; infinite: none.
struct Bounds {
    float low = -std::numeric_limits<float>::infinity();
    float high = std::numeric_limits<float>::infinity();

    bool any() const {
        return low > -std::numeric_limits<float>::infinity() || high < std::numeric_limits<float>::infinity();
    }
};

// A matrix whose inputs and outputs are limited.
struct ClippedMatrix {
    WeightMatrix matrix;
    Bounds input, output;
};

// Named as in the GGUF, shapes in ggml's order; n = n_head * head_dim.
struct VisionLayer {
    ggml_tensor* ln1 = nullptr;             // [d]
    ClippedMatrix attn_q, attn_k, attn_v;   // [d, n]
    ggml_tensor* attn_q_norm = nullptr;     // [head_dim]
    ggml_tensor* attn_k_norm = nullptr;     // [head_dim]
    ClippedMatrix attn_out;                 // [n, d]
    ggml_tensor* attn_post_norm = nullptr;  // [d]
    ggml_tensor* ln2 = nullptr;             // [d]
    ClippedMatrix ffn_gate, ffn_up;         // [d, n_ff]
    ClippedMatrix ffn_down;                 // [n_ff, d]
    ggml_tensor* ffn_post_norm = nullptr;   // [d]
};

// Whether a tensor is of the tower of another medium, which a file may have besides and which is not loaded.
bool is_audio(const std::string& name);

struct VisionWeights : LoadedTensors {
    // Throws if a tensor is missing, unknown, or of another shape or an unsupported type. Weights go to the
    // plan's main device, in the file's types; progress: of the copy to it.
    VisionWeights(const std::shared_ptr<const GgufFile>& file, const VisionHparams& hparams,
                  const DevicePlan& device_plan, const Backend& backend,
                  const std::function<void(double)>& progress);

    ggml_tensor* patch_embd;                 // [patch_size, patch_size, 3, d]
    ggml_tensor* position_embd;              // [d, n_positions, 2], of columns, then of rows
    std::vector<float> std_bias, std_scale;  // [d]; empty if features are not standardized
    WeightMatrix projection;                 // [d, projection_dim]
    std::vector<VisionLayer> layers;
    bool exact;  // whether all weights are F32
};

}  // namespace pydiffusion
