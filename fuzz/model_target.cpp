// Fuzz target: GgufFile, Hparams and Weights on nearly valid model headers. Expects a typed error, or every
// tensor inside the file with the size that the hyperparameters imply.
#include "file_check.h"
#include "memory_file.h"
#include "model/weights.h"
#include "util/error.h"

namespace {

void check_tensor(const pydiffusion::GgufFile& file, const ggml_tensor* tensor) {
    if (!tensor) return;
    const pydiffusion::TensorInfo* info = file.find_tensor(tensor->name);
    require(info != nullptr && ggml_nbytes(tensor) == info->n_bytes);
    const volatile auto* data = static_cast<const uint8_t*>(tensor->data);
    (void)data[0];
    (void)data[info->n_bytes - 1];
}

void check(const std::string& path) {
    const auto file = std::make_shared<const pydiffusion::GgufFile>(path);
    const pydiffusion::Hparams hparams(*file);
    require(hparams.layers.size() == static_cast<size_t>(hparams.n_layer));
    require(hparams.n_expert_used >= 1 && hparams.n_expert_used <= hparams.n_expert);
    require(hparams.canvas_length >= 1 && hparams.canvas_length <= hparams.n_ctx_train);
    require(hparams.rms_eps > 0 && hparams.soft_cap > 0);
    for (const pydiffusion::LayerShape& layer : hparams.layers) {
        require(layer.head_dim >= 2 && layer.head_dim % 2 == 0);
        require(layer.n_head_kv >= 1 && hparams.n_head % layer.n_head_kv == 0);
    }
    static const pydiffusion::Backend backend(1, "cpu");
    const pydiffusion::DevicePlan cpu_only;
    const pydiffusion::Weights weights(file, hparams, cpu_only, backend, [](double) {});
    for (const ggml_tensor* tensor :
         {weights.token_embd.tensor, weights.output.tensor, weights.rope_freqs[0]})
        check_tensor(*file, tensor);
    for (const pydiffusion::LayerWeights& layer : weights.layers) {
        for (const ggml_tensor* tensor :
             {layer.attn_q.tensor, layer.attn_k.tensor, layer.attn_v.tensor, layer.attn_output.tensor,
              layer.ffn_down.tensor, layer.ffn_gate_inp, layer.ffn_gate_up_exps, layer.ffn_gate_exps,
              layer.ffn_up_exps, layer.ffn_down_exps, layer.ffn_gate_up_exps_scale, layer.ffn_gate_exps_scale,
              layer.ffn_up_exps_scale, layer.encoder_scale}) {
            check_tensor(*file, tensor);
        }
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    try {
        check(memory_file(data, size, size_t{1} << 20));
    } catch (const pydiffusion::Error& error) {
        require(std::string(error.what()).find('\n') == std::string::npos);
    }
    return 0;
}
