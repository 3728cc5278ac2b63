#include "backend/backend.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "backend/attention_node.h"
#include "backend/devices.h"
#include "backend/fake_device.h"
#include "backend/own_kernels.h"
#include "backend/step_backend.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

// ggml multiplies fewer than 8 activations (tokens of an expert, the end of a prompt) with another kernel,
// whose sums differ in the last bits. With one kernel throughout, no result depends on what else is in the
// batch or on how a prompt is split into chunks; a step takes less than 1% longer. ggml reads this variable
// once, at its first matmul.
void force_one_matmul_kernel() {
#if defined(_WIN32)
    if (!std::getenv("GGML_CPU_TILED_MM_FORCE")) _putenv_s("GGML_CPU_TILED_MM_FORCE", "1");
#else
    setenv("GGML_CPU_TILED_MM_FORCE", "1", 0);
#endif
}

constexpr size_t kMaxBackends = 16;  // GGML_SCHED_MAX_BACKENDS, the CPU's included

}  // namespace

Backend::Backend(int n_threads, const std::string& device, const std::string& kernels)
    : n_threads_(n_threads),
      name_("CPU"),
      kernel_(device == "cpu" ? gemm::kernel_by_name(kernels) : gemm::Kernel::ggml),
      kernel_for_many_(device == "cpu" && kernels == "auto" ? gemm::fastest_kernel() : kernel_) {
    force_one_matmul_kernel();
    ggml_cpu_init();
    auto pool = std::make_unique<ThreadPool>(n_threads);
    if (device != "cpu") {
        if (kernels != "auto" && kernels != "ggml" && kernels != "cuda")
            throw Error(ErrorKind::argument, "there are no kernels " + quoted(kernels) + " for " + device +
                                                 ": choose auto, ggml or cuda");
        name_ = device;
        std::istringstream names(device);
        std::string name;
        while (std::getline(names, name, ',')) open_device(name, pool->for_ggml(), kernels);
        if (devices_.empty() || devices_.size() >= kMaxBackends)
            throw Error(ErrorKind::argument,
                        format("device names %zu devices; give 1 to %zu", devices_.size(), kMaxBackends - 1));
        step_backend_ = make_step_backend(devices_.back().get());
        cpu_.reset(ggml_backend_cpu_init());
        if (!cpu_)
            throw Error(ErrorKind::out_of_memory, "out of memory: failed to create ggml's CPU backend");
        ggml_backend_cpu_set_n_threads(cpu_.get(), n_threads);
        ggml_backend_cpu_set_threadpool(cpu_.get(), pool->for_ggml());
    }
    pool_ = pool.release();
}

void Backend::open_device(const std::string& name, ggml_threadpool_t threads, const std::string& kernels) {
    const bool on_host = is_fake_device(name);
    if (on_host) {
        devices_.push_back(make_fake_device(n_threads_, threads, name == kFakeDevice));
    } else if (ggml_backend_dev_t gpu = find_gpu(name)) {
        devices_.emplace_back(ggml_backend_dev_init(gpu, nullptr));
        has_gpu_ = true;
    } else {
        throw Error(ErrorKind::argument, why_no_device(name));
    }
    if (!devices_.back())
        throw Error(ErrorKind::out_of_memory,
                    "out of memory: failed to initialize the device " + quoted(name));
    // The host computes the same nodes by the CPU's functions, if asked.
    std::shared_ptr<void> own;
#if defined(PYDIFFUSION_CUDA)
    if (!on_host && kernels != "ggml") own = use_own_kernels(devices_.back().get(), kernels == "cuda");
#endif
    if (own) kernels_of_devices_.push_back(own);
    const bool has_own = own || (on_host && kernels == "cuda");
    if (kernels == "cuda" && !has_own)
        throw Error(ErrorKind::argument, name + " can't run the kernels \"cuda\": choose auto or ggml");
    own_kernels_ = own_kernels_ && has_own;
}

ggml_backend_buffer_type_t Backend::buffer_type(int32_t device) const {
    return device < 0 ? ggml_backend_cpu_buffer_type()
                      : ggml_backend_get_default_buffer_type(devices_[device].get());
}

bool Backend::device_supports(const ggml_tensor* node) const {
    return std::all_of(devices_.begin(), devices_.end(), [node](const ggml_backend_ptr& device) {
        return ggml_backend_supports_op(device.get(), node);
    });
}

namespace {

ggml_context_ptr make_probe_context() {
    ggml_context_ptr context(ggml_init({8 * ggml_tensor_overhead(), nullptr, true}));
    if (!context) throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate a ggml context");
    return context;
}

}  // namespace

bool Backend::multiplies_experts(const ggml_tensor* weights, const ggml_tensor* experts) const {
#if defined(PYDIFFUSION_CUDA)
    return has_cuda_kernels() && !(weights->buffer && ggml_backend_buffer_is_host(weights->buffer)) &&
           can_multiply_experts(weights, experts);
#else
    (void)weights;
    (void)experts;
    return false;
#endif
}

bool Backend::repacks(const ggml_tensor* weights) const {
#if defined(PYDIFFUSION_CUDA)
    return has_cuda_kernels() && std::all_of(kernels_of_devices_.begin(), kernels_of_devices_.end(),
                                             [weights](const std::shared_ptr<void>& kernels) {
                                                 return repacks_experts(kernels.get(), weights);
                                             });
#else
    (void)weights;
    return false;
#endif
}

bool Backend::attends(const ggml_tensor* q, const ggml_tensor* k, const ggml_tensor* v) const {
#if defined(PYDIFFUSION_CUDA)
    return has_cuda_kernels() && can_attend_by_kernel(q, k, v) &&
           std::all_of(kernels_of_devices_.begin(), kernels_of_devices_.end(),
                       [](const std::shared_ptr<void>& kernels) { return has_attention(kernels.get()); });
#else
    (void)q;
    (void)k;
    (void)v;
    return false;
#endif
}

void Backend::set_in_turn(bool in_turn) const {
#if defined(PYDIFFUSION_CUDA)
    for (const std::shared_ptr<void>& kernels : kernels_of_devices_) compute_in_turn(kernels.get(), in_turn);
#else
    (void)in_turn;
#endif
}

bool Backend::can_store(ggml_type type) const {
    const ggml_context_ptr context = make_probe_context();
    constexpr int64_t n = 256;
    ggml_tensor* rows = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, n, n);
    return device_supports(ggml_cpy(context.get(), rows, ggml_new_tensor_2d(context.get(), type, n, n)));
}

bool Backend::can_hold(ggml_type type) const {
    const ggml_context_ptr context = make_probe_context();
    ggml_context* ctx = context.get();
    constexpr int64_t n = 256;
    ggml_tensor* weight = ggml_new_tensor_3d(ctx, type, n, n, 2);
    ggml_tensor* activations = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n, 1, n);
    ggml_tensor* ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, n);
    ggml_tensor* matrix = ggml_new_tensor_2d(ctx, type, n, n);
    ggml_tensor* rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    return device_supports(ggml_mul_mat_id(ctx, weight, activations, ids)) &&
           device_supports(ggml_get_rows(ctx, matrix, rows));
}

std::unique_lock<std::mutex> Backend::lock_devices() const {
    return on_device() ? std::unique_lock<std::mutex>(devices_mutex_) : std::unique_lock<std::mutex>();
}

Backend::~Backend() {
    const ThreadPool* pool = pool_.load();
    if (pool->belongs_to_this_process()) delete pool;
}

// After a fork the parent's threads do not exist in the child, and the pool's mutex may be locked forever:
// the child starts its own pool and never touches the parent's.
ThreadPool& Backend::pool() {
    ThreadPool* current = pool_.load();
    if (current->belongs_to_this_process()) return *current;
    auto own = std::make_unique<ThreadPool>(n_threads_);
    if (pool_.compare_exchange_strong(current, own.get())) return *own.release();
    return *current;  // another thread of the child was faster
}

void Backend::stop() { ThreadPool::stop_all(); }

void Backend::compute(ggml_cgraph* graph, const std::function<bool()>& cancelled) {
    pool().compute(graph, cancelled);
}

}  // namespace pydiffusion
