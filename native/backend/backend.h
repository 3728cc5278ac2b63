// Backend: computes ggml graphs on the CPU, with one thread pool per model and process, or on GPUs with the
// CPU as a fallback.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "backend/cpu/thread_pool.h"
#include "backend/devices.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "util/cpu_kernels.h"

namespace pydiffusion {

class StepBackend;

class Backend {
  public:
    // device: "cpu", or a comma-separated list of names from list_devices(). The last one is the main device,
    // which also holds the tensors that belong to no layer. "host" stands in for a GPU: it runs the graphs
    // and kernels written for GPUs on the CPU, slowly, for tests. kernels: the CPU's matmul kernels, see
    // gemm::kernel_by_name; on other devices "ggml", or "cuda" for kernels of ours (expert matmuls, fused
    // rows), or "auto" for those where they have been measured to be faster.
    Backend(int n_threads, const std::string& device, const std::string& kernels = "auto");
    ~Backend();
    Backend(const Backend&) = delete;
    Backend& operator=(const Backend&) = delete;

    int n_threads() const { return n_threads_; }
    const char* name() const { return name_.c_str(); }
    // The matmul kernel of CPU graphs; graphs of ggml's own ops use ggml's matmuls.
    gemm::Kernel kernel() const { return kernel_; }
    // The kernel of CPU graphs with thousands of activations per matrix, where unpacking weights costs
    // little: ours rather than ggml's if the CPU has any, unless kernels were asked for by name.
    gemm::Kernel kernel_for_many() const { return kernel_for_many_; }
    // Name of the matmul kernels: that of kernel(), or "cuda" if devices run ours.
    const char* kernel_name() const { return fuses_rows() && on_device() ? "cuda" : gemm::name_of(kernel_); }
    // Whether graphs may have the nodes of fused_rows.h and top_k.h: on the CPU, and on devices with kernels
    // for them.
    bool fuses_rows() const { return own_kernels_; }
    // Whether devices multiply these weights [n_inner, n_rows, n_expert] by the nodes of expert_nodes.h;
    // experts [n_used, n_tokens].
    bool multiplies_experts(const ggml_tensor* weights, const ggml_tensor* experts) const;
    // Whether expert weights are to be repacked for the devices' kernels: see repacked_weights.h.
    bool repacks(const ggml_tensor* weights) const;
    // Whether devices compute attention with these operands by a kernel of ours: see attention_node.h.
    bool attends(const ggml_tensor* q, const ggml_tensor* k, const ggml_tensor* v) const;
    // Whether devices compute a dense MLP beside the mixture of experts: see mlp_beside.h.
    bool computes_mlp_beside() const { return has_cuda_kernels(); }
    // Whether they compute it in turn nevertheless, for graphs that end before join_branches.
    void set_in_turn(bool in_turn) const;

    // Whether graphs run on devices, and a StepBackend runs sampling and self-conditioning. If not, both are
    // nodes of the graph.
    bool on_device() const { return step_backend_ != nullptr; }
    bool has_gpu() const { return has_gpu_; }
    int32_t n_devices() const { return static_cast<int32_t>(devices_.size()); }
    StepBackend& step_backend() const { return *step_backend_; }
    // Whether every device supports this op with these operands.
    bool device_supports(const ggml_tensor* node) const;

    // Whether the devices support expert matmuls with weights of this type, and get_rows from them.
    bool can_hold(ggml_type type) const;
    // Whether the devices can store K and V as this type.
    bool can_store(ggml_type type) const;

    // Buffer type of a device or of kCpuDevice; without an argument, of the main device.
    ggml_backend_buffer_type_t buffer_type(int32_t device) const;
    ggml_backend_buffer_type_t buffer_type() const { return buffer_type(n_devices() - 1); }

    // Hold it while the devices compute: sessions take turns. Locks nothing on the CPU.
    std::unique_lock<std::mutex> lock_devices() const;

    // Cancels the graphs that any backend computes now, at process exit; later graphs are not affected.
    static void stop();

  private:
    friend class GraphExecutor;

    // Runs the graph on the CPU. See ThreadPool::compute.
    void compute(ggml_cgraph* graph, const std::function<bool()>& cancelled);

    // Whether all devices are GPUs with kernels of ours, not the host in place of one.
    bool has_cuda_kernels() const {
        return !devices_.empty() && kernels_of_devices_.size() == devices_.size();
    }
    ThreadPool& pool();
    void open_device(const std::string& name, ggml_threadpool_t threads, const std::string& kernels);

    int n_threads_;
    std::string name_;
    gemm::Kernel kernel_, kernel_for_many_;
    std::atomic<ThreadPool*> pool_;
    std::vector<ggml_backend_ptr> devices_;  // empty on the CPU
    ggml_backend_ptr cpu_;                   // fallback of devices_
    bool own_kernels_ = true;
    std::vector<std::shared_ptr<void>> kernels_of_devices_;  // see use_own_kernels()
    bool has_gpu_ = false;
    std::unique_ptr<StepBackend> step_backend_;  // of the main device
    mutable std::mutex devices_mutex_;
};

}  // namespace pydiffusion
