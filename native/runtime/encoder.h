// Causal mode: reads tokens into the KV cache.
#pragma once

#include <atomic>
#include <functional>
#include <vector>

#include "backend/graph_executor.h"
#include "graph/graph_builder.h"
#include "quant/imatrix_collector.h"

namespace pydiffusion {

// Appends ids to the cache in chunks. `between` is called after each chunk with the number of tokens done;
// what it throws ends the call, and the chunks done stay in the cache. With `hidden`, the last layer's output
// after the final norm is appended to it, d floats per token.
void encode(const Model& model, KvCache& cache, GraphExecutor& executor, const std::vector<int32_t>& ids,
            const std::atomic<bool>& cancel, const std::function<void(int32_t)>& between,
            std::vector<float>* hidden, ImatrixCollector* imatrix = nullptr);

}  // namespace pydiffusion
