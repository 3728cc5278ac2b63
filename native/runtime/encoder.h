// Encoder (prefill): appends tokens to the KV cache with causal attention.
#pragma once

#include <atomic>
#include <functional>
#include <vector>

#include "backend/graph_executor.h"
#include "graph/graph_builder.h"
#include "quantization/imatrix_collector.h"
#include "runtime/prompt_image.h"

namespace pydiffusion {

// What encode() writes besides the cache, unless null.
struct EncoderOutputs {
    float* hidden = nullptr;  // hidden states after the final norm, n_embd floats per token
    float* logits = nullptr;  // soft-capped logits after the last token, n_vocab floats; not with hidden
};

// Tokens of a prompt, and its images, by index in ids and in order.
struct Prompt {
    std::vector<int32_t> ids;
    std::vector<PromptImage> images{};
};

// Appends a prompt to the cache in chunks, none of which ends within an image. Calls `on_chunk` with the
// number of tokens done after each chunk; an exception from it ends the call and leaves the finished chunks
// in the cache. adapters: those that change anything. imatrix and trace observe the graphs, if given; without
// outputs, the last layer is not computed.
void encode(const Model& model, KvCache& cache, GraphExecutor& executor, const Prompt& prompt,
            const std::atomic<bool>& cancel, const std::function<void(int32_t)>& on_chunk,
            const EncoderOutputs& outputs, const AdapterList& adapters = {},
            ImatrixCollector* imatrix = nullptr, LayerTrace* trace = nullptr);

}  // namespace pydiffusion
