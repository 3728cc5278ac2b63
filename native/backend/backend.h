// Where graphs are computed: ggml's CPU kernels with a thread pool that is made once per model and process,
// or a GPU beside them.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "backend/cpu/amx/tile_gemm.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

namespace pydiffusion {

class StepKernels;

// A place beside the devices, which are 0, 1, ...
constexpr int32_t kProcessor = -1;

// A GPU that this build can compute on; empty names nothing.
struct DeviceInfo {
    std::string name;         // "CUDA0", ...
    std::string description;  // "NVIDIA GeForce RTX 4090"
    uint64_t free_bytes = 0;
    uint64_t total_bytes = 0;
};

std::vector<DeviceInfo> list_devices();

// What is wrong with a name that is none of theirs.
std::string why_no_device(const std::string& name);

// What allocates on the device of this name, be it "host"; the device is not opened.
ggml_backend_buffer_type_t buffer_type_of(const std::string& name);

class Engine {
  public:
    // device: "cpu"; a name out of list_devices(), or several with commas in between, the home of what is in
    // no layer last; or "host" in a GPU's place, which runs the graphs and kernels made for GPUs on the
    // processor: slow, to prove them. kernels: of the processor's products, see matrix::kernel_named.
    Engine(int n_threads, const std::string& device, const std::string& kernels = "auto");
    ~Engine();
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    int n_threads() const { return n_threads_; }
    const char* name() const { return name_.c_str(); }
    // What multiplies in graphs of the processor's own; portable graphs have ggml's products.
    matrix::Kernel kernel() const { return kernel_; }

    // Whether graphs consist of operations that every backend has, and what goes on beside the layers is the
    // kernels'; else our own operations for the processor are in the graph.
    bool on_device() const { return kernels_ != nullptr; }
    bool has_gpu() const { return has_gpu_; }
    int32_t n_devices() const { return static_cast<int32_t>(devices_.size()); }
    StepKernels& kernels() const { return *kernels_; }
    // Whether every device itself has this operation with these operands.
    bool device_supports(const ggml_tensor* node) const;

    // Whether weights of this type can be multiplied with, and rows of it be taken, where the device is.
    bool can_hold(ggml_type type) const;
    // Whether keys and values can be written there as this type.
    bool can_store(ggml_type type) const;

    // Of what belongs to a device, or to kProcessor; and where what is in no layer belongs.
    ggml_backend_buffer_type_t buffer_type(int32_t place) const;
    ggml_backend_buffer_type_t buffer_type() const { return buffer_type(n_devices() - 1); }

    // Held while a device computes: sessions take turns.
    std::unique_lock<std::mutex> device_turn() const;

    // Cancels whatever any engine computes now. For the process's end; what begins afterwards is not touched.
    static void stop();

  private:
    friend class Workspace;

    // Runs the graph on the processor; sessions take turns, since each run uses all threads. Throws
    // Error(cancelled) soon after `cancelled` begins to return true.
    void compute(ggml_cgraph* graph, const std::function<bool()>& cancelled);

    struct Pool;
    Pool& pool();
    void open_device(const std::string& name, ggml_threadpool_t threads);

    int n_threads_;
    std::string name_;
    matrix::Kernel kernel_;
    std::atomic<Pool*> pool_;
    std::vector<ggml_backend_ptr> devices_;  // none on the processor
    ggml_backend_ptr cpu_;                   // beside them
    bool has_gpu_ = false;
    std::unique_ptr<StepKernels> kernels_;  // of the last device
    mutable std::mutex device_mutex_;
};

// Asks for pages of 2 MiB under what a buffer in the processor's memory does not use yet: rows of activations
// lie further apart than a small page, and each would miss the table of translations.
void use_large_pages(ggml_backend_buffer_t buffer);

// Memory for one graph at a time, and the way to run it.
class Workspace {
  public:
    explicit Workspace(Engine& engine);

    // Lays the graph out, in place of the one before; on devices with the tensors of `inputs`, which keep
    // their memory while it stands: first the processor's, then each device's. Of a pair in `kept` the first
    // is computed where the second, a weight, lies. Throws Error(out_of_memory) with "no memory for `what`".
    using Kept = std::vector<std::pair<ggml_tensor*, const ggml_tensor*>>;
    void allocate(ggml_cgraph* graph, const std::vector<ggml_context_ptr>& inputs, const Kept& kept,
                  const char* what);

    // Runs the graph laid out last.
    void compute(ggml_cgraph* graph, const std::function<bool()>& cancelled);
    // Into how many pieces the graph laid out last was cut: one wherever the place changes.
    int n_pieces() const { return scheduler_ ? ggml_backend_sched_get_n_splits(scheduler_.get()) : 1; }
    // Runs nodes that have their memory already and all belong where the engine computes.
    void compute_nodes(ggml_cgraph* nodes, const std::function<bool()>& cancelled);

  private:
    void require_success(ggml_status status) const;
    bool place_inputs(int32_t place, ggml_context* inputs);
    bool schedule(ggml_cgraph* graph, const Kept& kept);
    ggml_backend_t backend_of(const ggml_tensor* weight) const;

    Engine& engine_;
    ggml_gallocr_ptr allocator_;        // on the processor alone
    ggml_backend_sched_ptr scheduler_;  // else
    size_t scheduler_size_ = 0;
    std::vector<ggml_backend_buffer_ptr> inputs_;  // the processor's, then each device's
};

}  // namespace pydiffusion
