// Encoder (prefill): appends tokens to the KV cache with causal attention.
#pragma once

#include <atomic>
#include <functional>
#include <vector>

#include "backend/graph_executor.h"
#include "graph/graph_builder.h"
#include "quantization/imatrix_collector.h"

namespace pydiffusion {

// Appends ids to the cache in chunks. Calls `on_chunk` with the number of tokens done after each chunk; an
// exception from it ends the call and leaves the finished chunks in the cache. If `hidden` is not null,
// writes the hidden states after the final norm to it, n_embd floats per token. imatrix and trace observe
// the graphs, if given; without `hidden`, the last layer is not computed.
void encode(const Model& model, KvCache& cache, GraphExecutor& executor, const std::vector<int32_t>& ids,
            const std::atomic<bool>& cancel, const std::function<void(int32_t)>& on_chunk, float* hidden,
            ImatrixCollector* imatrix = nullptr, LayerTrace* trace = nullptr);

}  // namespace pydiffusion
