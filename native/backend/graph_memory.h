// Memory for the tensors of a graph.
#pragma once

#include <cstdlib>
#include <memory>

#include "ggml-cpp.h"

namespace pydiffusion {

// For one graph after another; stays at its address for graphs of the same size.
class GraphMemory {
  public:
    void* reserve(size_t n_bytes);  // null if there is not enough

  private:
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> memory_;
    size_t n_bytes_ = 0;
};

// A context with room for a graph of n_nodes and their tensors; in `memory` unless that is null. Throws
// Error(out_of_memory).
ggml_context_ptr new_graph_context(size_t n_nodes, GraphMemory* memory = nullptr);

}  // namespace pydiffusion
