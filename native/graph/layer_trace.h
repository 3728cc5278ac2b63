// Layer trace: values within the layers of graphs, kept to be compared with a reference.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "ggml.h"

namespace pydiffusion {

// Rows of all graphs so far, one per token: [width, n_tokens].
struct TracedRows {
    int64_t width = 0;
    std::vector<float> values;
};

// Off in normal runs: kept values occupy memory of a graph until its end, and a device can't fuse the
// operations around them.
class LayerTrace {
  public:
    // Before a graph is built: forgets the tensors of the one before, not their values.
    void begin_graph() { kept_.clear(); }
    // While it is built: keeps x, F32 [width, n_tokens], from being overwritten.
    void keep(const char* name, int32_t i_layer, ggml_tensor* x);
    // After it was computed: appends the values.
    void read();

    // By layer and name.
    const std::map<std::pair<int32_t, std::string>, TracedRows>& rows() const { return rows_; }

  private:
    std::map<std::pair<int32_t, std::string>, ggml_tensor*> kept_;
    std::map<std::pair<int32_t, std::string>, TracedRows> rows_;
};

}  // namespace pydiffusion
