#include "model/weights.h"

#include "model/architecture.h"
#include "model/weights_loader.h"

namespace pydiffusion {

Weights::Weights(std::shared_ptr<const GgufFile> file, const Hparams& hp, const DevicePlan& device_plan,
                 const Backend& backend, const std::function<void(double)>& progress)
    : LoadedTensors(std::move(file)), rope_freqs(backend.n_devices() + 1) {
    WeightsLoader load(*this, *file_, device_plan, backend);
    token_embd = load.matrix("token_embd.weight", {hp.n_embd, hp.n_vocab});
    output = load.has("output.weight") ? load.matrix("output.weight", {hp.n_embd, hp.n_vocab}) : token_embd;
    output_norm = load.f32("output_norm.weight", {hp.n_embd});
    hp.architecture->load_weights(load, hp, *this);
    load.refuse_unknown_tensors();
    load.upload(progress, {token_embd, output});  // for self-conditioning and the head
}

ggml_tensor* LoadedTensors::find(const std::string& name) const {
    const auto found = by_name_.find(name);
    return found == by_name_.end() ? nullptr : found->second;
}

}  // namespace pydiffusion
