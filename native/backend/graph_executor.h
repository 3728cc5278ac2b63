// GraphExecutor: allocates graphs and runs them on a backend.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "backend/backend.h"

namespace pydiffusion {

// Requests 2 MiB pages for a CPU buffer that has not been written yet: rows of activations are more than a
// 4 KiB page apart, so each would miss the TLB.
void use_large_pages(ggml_backend_buffer_t buffer);

// Owns the memory of one graph at a time, and runs that graph.
class GraphExecutor {
  public:
    explicit GraphExecutor(Backend& backend);

    // Allocates the graph in place of the previous one. `inputs` holds the input tensors per device, the
    // CPU's first; they keep their memory while the graph is allocated. A pair in `pinned` is a node and the
    // weight on whose device it is computed. Throws Error(out_of_memory), which names `what`.
    using Pinned = std::vector<std::pair<ggml_tensor*, const ggml_tensor*>>;
    void allocate(ggml_cgraph* graph, const std::vector<ggml_context_ptr>& inputs, const Pinned& pinned,
                  const char* what);

    // Runs the graph allocated last.
    void compute(ggml_cgraph* graph, const std::function<bool()>& cancelled);
    // The same, but on a device it may still run when this returns: what the devices are given next comes
    // after it, and an error may become known no sooner than there.
    void launch(ggml_cgraph* graph, const std::function<bool()>& cancelled);
    // Returns when what was launched has ended.
    void finish();
    // Number of splits of the graph allocated last: a new one wherever the device changes.
    int n_splits() const { return scheduler_ ? ggml_backend_sched_get_n_splits(scheduler_.get()) : 1; }
    // Runs nodes that are already allocated, all of them on the main device.
    void compute_nodes(ggml_cgraph* nodes, const std::function<bool()>& cancelled);

  private:
    void require_success(ggml_status status) const;
    bool allocate_inputs(int32_t device, ggml_context* inputs);
    bool schedule(ggml_cgraph* graph, const Pinned& pinned);
    ggml_backend_t backend_of(const ggml_tensor* weight) const;

    Backend& backend_;
    ggml_gallocr_ptr allocator_;        // without devices
    ggml_backend_sched_ptr scheduler_;  // with devices
    size_t scheduler_size_ = 0;
    std::vector<ggml_backend_buffer_ptr> inputs_;  // the CPU's, then each device's
};

}  // namespace pydiffusion
