// Memory for graphs, and the way to run them.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "backend/backend.h"

namespace pydiffusion {

// Asks for pages of 2 MiB under what a buffer in the processor's memory does not use yet: rows of activations
// lie further apart than a small page, and each would miss the table of translations.
void use_large_pages(ggml_backend_buffer_t buffer);

// Memory for one graph at a time, and the way to run it.
class GraphExecutor {
  public:
    explicit GraphExecutor(Backend& backend);

    // Lays the graph out, in place of the one before; on devices with the tensors of `inputs`, which keep
    // their memory while it stands: first the processor's, then each device's. Of a pair in `pinned` the
    // first is computed where the second, a weight, lies. Throws Error(out_of_memory) with "no memory for
    // `what`".
    using Pinned = std::vector<std::pair<ggml_tensor*, const ggml_tensor*>>;
    void allocate(ggml_cgraph* graph, const std::vector<ggml_context_ptr>& inputs, const Pinned& pinned,
                  const char* what);

    // Runs the graph laid out last.
    void compute(ggml_cgraph* graph, const std::function<bool()>& cancelled);
    // Into how many pieces the graph laid out last was cut: one wherever the place changes.
    int n_splits() const { return scheduler_ ? ggml_backend_sched_get_n_splits(scheduler_.get()) : 1; }
    // Runs nodes that have their memory already and all belong where the backend computes.
    void compute_nodes(ggml_cgraph* nodes, const std::function<bool()>& cancelled);

  private:
    void require_success(ggml_status status) const;
    bool allocate_inputs(int32_t device, ggml_context* inputs);
    bool schedule(ggml_cgraph* graph, const Pinned& pinned);
    ggml_backend_t backend_of(const ggml_tensor* weight) const;

    Backend& backend_;
    ggml_gallocr_ptr allocator_;        // on the processor alone
    ggml_backend_sched_ptr scheduler_;  // else
    size_t scheduler_size_ = 0;
    std::vector<ggml_backend_buffer_ptr> inputs_;  // the processor's, then each device's
};

}  // namespace pydiffusion
