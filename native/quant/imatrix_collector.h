// What the columns of each matrix are met with: sums of squares of activations, for quantizing by importance.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "backend/cpu/matmul.h"
#include "ggml.h"

namespace pydiffusion {

struct ImatrixEntry {
    int64_t n_per_row = 0;
    std::vector<double> sums;     // [n_per_row * n_matrices], of squares
    std::vector<int64_t> counts;  // [n_matrices], rows of activations
};

// Gathers over the graphs it is shown; off in normal runs, for it keeps every activation of a graph in
// memory.
class ImatrixCollector {
  public:
    // Before the graph's memory is laid out: the inputs of its matrix products survive until its end.
    static void keep_inputs(ggml_cgraph* graph);
    // After it was computed, on a backend whose memory the host can read.
    void add(ggml_cgraph* graph);

    // By the weight's name. Experts have a matrix each, other weights one.
    const std::map<std::string, ImatrixEntry>& by_weight() const { return by_weight_; }

  private:
    void add_product(const gemm::MatmulOperands& factors);

    std::map<std::string, ImatrixEntry> by_weight_;
};

}  // namespace pydiffusion
