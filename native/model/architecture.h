// Architecture: all that one kind of model adds to the runtime. The classes, and the registry, are in
// architectures/.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ggml.h"

namespace pydiffusion {

class KeyReader;
class WeightsLoader;
struct GraphBuilder;
struct Hparams;
struct Weights;

class Architecture {
  public:
    virtual ~Architecture() = default;

    // general.architecture of its files.
    virtual const char* name() const = 0;
    // The sampler of its models, by the name of its table.
    virtual const char* sampler() const = 0;

    // Reads the model's own keys. Throws Error(unsupported) for a feature that is not implemented,
    // Error(format) for invalid values.
    virtual void read_hparams(const KeyReader& keys, Hparams& hparams) const = 0;
    // Requests the model's tensors but for embedding and head.
    virtual void load_weights(WeightsLoader& load, const Hparams& hparams, Weights& weights) const = 0;

    // Input of the first layer [d, n_tokens]: of a prompt's tokens, I32 [n_tokens]; of canvases, with the
    // soft embedding of the previous step, F32 [d, n_tokens], as self-conditioning.
    virtual ggml_tensor* embed_prompt(GraphBuilder& g, ggml_tensor* tokens) const = 0;
    virtual ggml_tensor* embed_canvas(GraphBuilder& g, ggml_tensor* tokens, ggml_tensor* soft) const = 0;
    // One layer, x [d, n_tokens] -> [d, n_tokens]: writes K and V to the rows after each sequence's cache,
    // then attends over the visible rows.
    virtual ggml_tensor* layer(GraphBuilder& g, int32_t i_layer, ggml_tensor* x) const = 0;
    // Of a layer, the writes of K and V only: all that a prompt needs of the last layer.
    virtual void store_keys_and_values(GraphBuilder& g, int32_t i_layer, ggml_tensor* x) const = 0;
};

// The architecture of this name; null if none is registered.
const Architecture* find_architecture(const std::string& name);
std::vector<std::string> architecture_names();
// Adds one besides those built in; it must live as long as the process. Throws Error(argument) if the name is
// taken. Not thread-safe.
void register_architecture(const Architecture& architecture);

}  // namespace pydiffusion
