// Importance matrix (imatrix): sums of squared activations per column of each weight, for quantization.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "backend/cpu/matmul.h"
#include "ggml.h"

namespace pydiffusion {

struct ImatrixEntry {
    int64_t n_per_row = 0;
    std::vector<double> sums;     // [n_per_row * n_matrices], sums of squares
    std::vector<int64_t> counts;  // [n_matrices], rows of activations seen
};

// Accumulates over graphs. Off in normal runs, since it keeps all matmul inputs of a graph in memory.
class ImatrixCollector {
  public:
    // is_wanted: whether to collect the activations that a weight multiplies.
    explicit ImatrixCollector(std::function<bool(const ggml_tensor*)> is_wanted)
        : is_wanted_(std::move(is_wanted)) {}

    // Before the graph is allocated: keeps its matmuls' inputs from being overwritten.
    void keep_inputs(ggml_cgraph* graph) const;
    // After the graph was computed, in memory that the host can read.
    void add(ggml_cgraph* graph);

    // Keyed by the weight's name. One matrix per expert, one for other weights.
    const std::map<std::string, ImatrixEntry>& by_weight() const { return by_weight_; }

  private:
    // Operands of a node that is a matmul with a wanted weight; else none.
    gemm::MatmulOperands wanted_operands(const ggml_tensor* node) const;
    void add_matmul(const gemm::MatmulOperands& operands);

    std::function<bool(const ggml_tensor*)> is_wanted_;
    std::map<std::string, ImatrixEntry> by_weight_;
};

}  // namespace pydiffusion
