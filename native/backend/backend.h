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
#include "backend/devices.h"
#include "backend/thread_pool.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

namespace pydiffusion {

class StepBackend;

class Backend {
  public:
    // device: "cpu"; a name out of list_devices(), or several with commas in between, the home of what is in
    // no layer last; or "host" in a GPU's device, which runs the graphs and kernels made for GPUs on the
    // processor: slow, to prove them. kernels: of the processor's products, see gemm::kernel_by_name.
    Backend(int n_threads, const std::string& device, const std::string& kernels = "auto");
    ~Backend();
    Backend(const Backend&) = delete;
    Backend& operator=(const Backend&) = delete;

    int n_threads() const { return n_threads_; }
    const char* name() const { return name_.c_str(); }
    // What multiplies in graphs of the processor's own; portable graphs have ggml's products.
    gemm::Kernel kernel() const { return kernel_; }

    // Whether graphs consist of operations that every backend has, and what goes on beside the layers is the
    // kernels'; else our own operations for the processor are in the graph.
    bool on_device() const { return step_backend_ != nullptr; }
    bool has_gpu() const { return has_gpu_; }
    int32_t n_devices() const { return static_cast<int32_t>(devices_.size()); }
    StepBackend& step_backend() const { return *step_backend_; }
    // Whether every device itself has this operation with these operands.
    bool device_supports(const ggml_tensor* node) const;

    // Whether weights of this type can be multiplied with, and rows of it be taken, where the device is.
    bool can_hold(ggml_type type) const;
    // Whether keys and values can be written there as this type.
    bool can_store(ggml_type type) const;

    // Of what belongs to a device, or to kCpuDevice; and where what is in no layer belongs.
    ggml_backend_buffer_type_t buffer_type(int32_t device) const;
    ggml_backend_buffer_type_t buffer_type() const { return buffer_type(n_devices() - 1); }

    // Held while a device computes: sessions take turns.
    std::unique_lock<std::mutex> lock_devices() const;

    // Cancels whatever any backend computes now. For the process's end; what begins afterwards is not
    // touched.
    static void stop();

  private:
    friend class GraphExecutor;

    // Runs the graph on the processor. See ThreadPool::compute.
    void compute(ggml_cgraph* graph, const std::function<bool()>& cancelled);

    ThreadPool& pool();
    void open_device(const std::string& name, ggml_threadpool_t threads);

    int n_threads_;
    std::string name_;
    gemm::Kernel kernel_;
    std::atomic<ThreadPool*> pool_;
    std::vector<ggml_backend_ptr> devices_;  // none on the processor
    ggml_backend_ptr cpu_;                   // beside them
    bool has_gpu_ = false;
    std::unique_ptr<StepBackend> step_backend_;  // of the last device
    mutable std::mutex devices_mutex_;
};

}  // namespace pydiffusion
