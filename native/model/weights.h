// Model weights, immutable and shared by all sessions: in the file's mapping or on a device.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "backend/weight_matrix.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "gguf/gguf_file.h"
#include "model/device_plan.h"
#include "model/hparams.h"

namespace pydiffusion {

// The tensors of a layer, of any architecture: named as in the GGUF, shapes in ggml's order; null if absent.
struct LayerWeights {
    // Matrices that multiply the same activations, concatenated; null unless they are BF16 on a device and
    // have no scales. The single ones are then views of them.
    ggml_tensor* attn_qkv = nullptr;     // [d, (n_head + 2 * n_head_kv) * head_dim], without V in full layers
    ggml_tensor* ffn_gate_up = nullptr;  // [d, 2 * n_ff]
    ggml_tensor* attn_norm = nullptr;    // [d]
    WeightMatrix attn_q;                 // [d, head_dim * n_head]
    WeightMatrix attn_k;                 // [d, head_dim * n_head_kv]
    WeightMatrix attn_v;                 // as attn_k; null in full layers, which compute V with attn_k
    WeightMatrix attn_output;            // [head_dim * n_head, d]
    ggml_tensor* attn_q_norm = nullptr;  // [head_dim]
    ggml_tensor* attn_k_norm = nullptr;  // [head_dim]
    ggml_tensor* post_attention_norm = nullptr;  // [d]
    ggml_tensor* ffn_norm = nullptr;             // [d]
    WeightMatrix ffn_gate;                       // [d, n_ff]
    WeightMatrix ffn_up;                         // [d, n_ff]
    WeightMatrix ffn_down;                       // [n_ff, d]
    ggml_tensor* post_ffw_norm_1 = nullptr;      // [d]
    ggml_tensor* pre_ffw_norm_2 = nullptr;       // [d]
    ggml_tensor* ffn_gate_inp = nullptr;         // [d, n_expert], the router
    ggml_tensor* ffn_gate_inp_scale = nullptr;   // [d]
    // [d, 2 * n_ff_expert, n_expert], gate rows first; if null, the next two are set.
    ggml_tensor* ffn_gate_up_exps = nullptr;
    ggml_tensor* ffn_gate_exps = nullptr;  // [d, n_ff_expert, n_expert]
    ggml_tensor* ffn_up_exps = nullptr;    // [d, n_ff_expert, n_expert]
    ggml_tensor* ffn_down_exps = nullptr;  // [n_ff_expert, d, n_expert]
    // [n_expert] of the matrices above, by which their results are multiplied; null if the file has none.
    ggml_tensor* ffn_gate_up_exps_scale = nullptr;
    ggml_tensor* ffn_gate_exps_scale = nullptr;
    ggml_tensor* ffn_up_exps_scale = nullptr;
    ggml_tensor* ffn_down_exps_scale = nullptr;  // [n_expert], the router's per-expert scale
    ggml_tensor* post_ffw_norm_2 = nullptr;      // [d]
    ggml_tensor* post_ffw_norm = nullptr;        // [d]
    ggml_tensor* decoder_scale = nullptr;        // [1], layer_output_scale
    ggml_tensor* encoder_scale = nullptr;        // [1], enc_layer_output_scale
};

// Tensors of a file, in its mapping or on devices; WeightsLoader fills it.
struct LoadedTensors {
    explicit LoadedTensors(std::shared_ptr<const GgufFile> file) : file_(std::move(file)) {}
    LoadedTensors(const LoadedTensors&) = delete;
    LoadedTensors& operator=(const LoadedTensors&) = delete;

    std::map<ggml_type, uint64_t> bytes_by_type;
    uint64_t n_weights = 0;
    bool repacked_experts = false;  // on devices, for our kernels

    // By name in the file (the first, if there is one on each device); null if none was loaded.
    ggml_tensor* find(const std::string& name) const;

  protected:
    std::shared_ptr<const GgufFile> file_;  // keeps the mapping alive

  private:
    friend class WeightsLoader;
    std::vector<ggml_context_ptr> contexts_;  // of the mapped tensors, then of each device's
    std::vector<ggml_backend_buffer_ptr> buffers_;
    std::map<std::string, ggml_tensor*> by_name_;
};

struct Weights : LoadedTensors {
    // Those that the hyperparameters' architecture asks for. Throws if a tensor is missing or has another
    // shape or a type that this build can't compute with. Copies to each device the tensors that the plan
    // assigns to it, in the type that the plan gives them, reporting the fraction done to `progress`; tensors
    // of types that the device can't compute with stay in the mapping.
    Weights(std::shared_ptr<const GgufFile> file, const Hparams& hparams, const DevicePlan& device_plan,
            const Backend& backend, const std::function<void(double)>& progress);

    WeightMatrix token_embd;  // [d, n_vocab]
    WeightMatrix output;      // [d, n_vocab]; token_embd if tied
    ggml_tensor* output_norm;
    // [head_dim / 2] for full layers: on the CPU, then on each device; null if a device has no full layer.
    std::vector<ggml_tensor*> rope_freqs;
    std::vector<float> rope_factors;  // the same on the host; empty if there is no full layer
    ggml_tensor* self_cond_pre_norm = nullptr;
    ggml_tensor* self_cond_gate_up = nullptr;  // as ffn_gate_up
    WeightMatrix self_cond_gate;
    WeightMatrix self_cond_up;
    WeightMatrix self_cond_down;
    std::vector<LayerWeights> layers;
};

}  // namespace pydiffusion
