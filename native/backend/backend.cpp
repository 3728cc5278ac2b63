#include "backend/backend.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <system_error>
#include <thread>

#include "backend/fake_device.h"
#include "backend/step_backend.h"
#include "ggml-alloc.h"
#include "util/error.h"

#if defined(PYDIFFUSION_CUDA)
#include "ggml-cuda.h"
#endif
#if !defined(_WIN32)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pydiffusion {

namespace {

long process_id() {
#if defined(_WIN32)
    return 0;  // no fork there
#else
    return static_cast<long>(getpid());
#endif
}

// ggml aborts the process where it can't start a thread, so try before it does.
void require_threads(int n) {
    std::mutex gate;
    std::vector<std::thread> threads;
    threads.reserve(n);
    bool started = true;
    {
        const std::lock_guard<std::mutex> closed(gate);  // all of them live at the same time
        try {
            for (int i = 0; i < n; ++i)
                threads.emplace_back([&gate] { const std::lock_guard<std::mutex> pass(gate); });
        } catch (const std::system_error&) {
            started = false;
        }
    }
    for (std::thread& thread : threads) thread.join();
    if (!started) {
        throw Error(ErrorKind::out_of_memory,
                    format("%d threads can't be started: memory or a limit on processes does not permit; "
                           "choose a smaller n_threads",
                           n + 1));
    }
}

// ggml multiplies fewer than 8 columns (tokens of an expert, the rest of a prompt) with another kernel, whose
// sums differ in the last bits. With one kernel throughout, no answer depends on what else was in the batch
// or how a prompt was cut; a step costs less than a hundredth more. ggml reads this once, at its first
// product.
void take_one_kernel_for_all_widths() {
#if defined(_WIN32)
    if (!std::getenv("GGML_CPU_TILED_MM_FORCE")) _putenv_s("GGML_CPU_TILED_MM_FORCE", "1");
#else
    setenv("GGML_CPU_TILED_MM_FORCE", "1", 0);
#endif
}

}  // namespace

// Threads and work area: of one process, since threads do not survive a fork.
struct Engine::Pool {
    explicit Pool(int n_threads) {
        require_memory(size_t{8} << 20);
        require_threads(n_threads - 1);
        ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
        params.poll = 1;  // wait awake for milliseconds, not for a third of a second at others' expense
        threads = ggml_threadpool_new(&params);
        if (!threads) throw Error(ErrorKind::out_of_memory, format("could not start %d threads", n_threads));
    }
    ~Pool() { ggml_threadpool_free(threads); }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    const long process = process_id();
    ggml_threadpool_t threads;
    std::mutex turn;
    std::unique_ptr<uint8_t[]> work;
    size_t work_size = 0;
};

namespace {

constexpr size_t kMaxBackends = 16;  // of ggml's scheduler, the processor's among them

// Of the backend that there are StepKernels for; those of any other could not run them.
bool is_gpu_with_kernels(ggml_backend_dev_t device) {
#if defined(PYDIFFUSION_CUDA)
    const enum ggml_backend_dev_type type = ggml_backend_dev_type(device);
    return (type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU) &&
           ggml_backend_dev_backend_reg(device) == ggml_backend_cuda_reg();
#else
    (void)device;
    return false;
#endif
}

std::vector<ggml_backend_dev_t> gpus() {
    std::vector<ggml_backend_dev_t> found;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        if (is_gpu_with_kernels(device)) found.push_back(device);
    }
    return found;
}

ggml_backend_dev_t find_gpu(const std::string& name) {
    for (ggml_backend_dev_t device : gpus()) {
        if (name == ggml_backend_dev_name(device)) return device;
    }
    return nullptr;
}

// For one of the engine's own devices, which are "host" or GPUs with kernels.
std::unique_ptr<StepKernels> make_kernels(ggml_backend_t device) {
#if defined(PYDIFFUSION_CUDA)
    if (is_gpu_with_kernels(ggml_backend_get_device(device))) return make_cuda_kernels(device);
#endif
    (void)device;
    return make_host_kernels();
}

}  // namespace

std::vector<DeviceInfo> list_devices() {
    std::vector<DeviceInfo> infos;
    for (ggml_backend_dev_t device : gpus()) {
        DeviceInfo info;
        info.name = ggml_backend_dev_name(device);
        info.description = ggml_backend_dev_description(device);
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(device, &free, &total);
        info.free_bytes = free;
        info.total_bytes = total;
        infos.push_back(info);
    }
    return infos;
}

std::string why_no_device(const std::string& name) {
    ggml_backend_dev_t known = ggml_backend_dev_by_name(name.c_str());
    if (!known || name != ggml_backend_dev_name(known))  // which is found in any case of letters
        return "there is no device " + quoted(name) + " to compute on";
    const char* backend = ggml_backend_reg_name(ggml_backend_dev_backend_reg(known));
    return "the device " + quoted(name) + " belongs to ggml's " + backend +
           " backend, for which this build has no kernels: use device=\"cpu\" (--device cpu)";
}

ggml_backend_buffer_type_t buffer_type_of(const std::string& name) {
    ggml_backend_dev_t gpu = find_gpu(name);
    return gpu ? ggml_backend_dev_buffer_type(gpu) : ggml_backend_cpu_buffer_type();
}

Engine::Engine(int n_threads, const std::string& device, const std::string& kernels)
    : n_threads_(n_threads),
      name_("CPU"),
      kernel_(device == "cpu" ? matrix::kernel_named(kernels) : matrix::Kernel::ggml) {
    take_one_kernel_for_all_widths();
    ggml_cpu_init();
    auto pool = std::make_unique<Pool>(n_threads);
    if (device != "cpu") {
        name_ = device;
        std::istringstream names(device);
        std::string name;
        while (std::getline(names, name, ',')) open_device(name, pool->threads);
        if (devices_.empty() || devices_.size() >= kMaxBackends)
            throw Error(ErrorKind::argument, format("%zu devices to compute on; possible are 1 to %zu",
                                                    devices_.size(), kMaxBackends - 1));
        kernels_ = make_kernels(devices_.back().get());
        cpu_.reset(ggml_backend_cpu_init());
        if (!cpu_) throw Error(ErrorKind::out_of_memory, "no memory for ggml's CPU backend");
        ggml_backend_cpu_set_n_threads(cpu_.get(), n_threads);
        ggml_backend_cpu_set_threadpool(cpu_.get(), pool->threads);
    }
    pool_ = pool.release();
}

void Engine::open_device(const std::string& name, ggml_threadpool_t threads) {
    if (name == "host") {
        devices_.push_back(make_host_backend(n_threads_, threads));
    } else if (ggml_backend_dev_t gpu = find_gpu(name)) {
        devices_.emplace_back(ggml_backend_dev_init(gpu, nullptr));
        has_gpu_ = true;
    } else {
        throw Error(ErrorKind::argument, why_no_device(name));
    }
    if (!devices_.back()) throw Error(ErrorKind::out_of_memory, "no memory to begin with on " + quoted(name));
}

ggml_backend_buffer_type_t Engine::buffer_type(int32_t place) const {
    return place < 0 ? ggml_backend_cpu_buffer_type()
                     : ggml_backend_get_default_buffer_type(devices_[place].get());
}

bool Engine::device_supports(const ggml_tensor* node) const {
    return std::all_of(devices_.begin(), devices_.end(), [node](const ggml_backend_ptr& device) {
        return ggml_backend_supports_op(device.get(), node);
    });
}

namespace {

ggml_context_ptr context_for_a_question() {
    ggml_context_ptr context(ggml_init({8 * ggml_tensor_overhead(), nullptr, true}));
    if (!context) throw Error(ErrorKind::out_of_memory, "no memory for a tensor's description");
    return context;
}

}  // namespace

bool Engine::can_store(ggml_type type) const {
    const ggml_context_ptr context = context_for_a_question();
    constexpr int64_t n = 256;
    ggml_tensor* rows = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, n, n);
    return device_supports(ggml_cpy(context.get(), rows, ggml_new_tensor_2d(context.get(), type, n, n)));
}

bool Engine::can_hold(ggml_type type) const {
    const ggml_context_ptr context = context_for_a_question();
    ggml_context* ctx = context.get();
    constexpr int64_t n = 256;
    ggml_tensor* weight = ggml_new_tensor_3d(ctx, type, n, n, 2);
    ggml_tensor* columns = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n, 1, n);
    ggml_tensor* ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, n);
    ggml_tensor* matrix = ggml_new_tensor_2d(ctx, type, n, n);
    ggml_tensor* rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    return device_supports(ggml_mul_mat_id(ctx, weight, columns, ids)) &&
           device_supports(ggml_get_rows(ctx, matrix, rows));
}

std::unique_lock<std::mutex> Engine::device_turn() const {
    return on_device() ? std::unique_lock<std::mutex>(device_mutex_) : std::unique_lock<std::mutex>();
}

Engine::~Engine() {
    const Pool* pool = pool_.load();
    if (pool->process == process_id()) delete pool;
}

// In a child after fork there are none of the parent's threads, and its lock may be held for ever: the child
// starts a pool of its own, and leaves the parent's alone.
Engine::Pool& Engine::pool() {
    Pool* current = pool_.load();
    if (current->process == process_id()) return *current;
    auto own = std::make_unique<Pool>(n_threads_);
    if (pool_.compare_exchange_strong(current, own.get())) return *own.release();
    return *current;  // another thread of the child was faster
}

namespace {

std::atomic<unsigned> n_stops{0};

struct Abort {
    const std::function<bool()>& cancelled;
    const unsigned n_stops_before = n_stops;
};

}  // namespace

void Engine::stop() { ++n_stops; }

void Engine::compute(ggml_cgraph* graph, const std::function<bool()>& cancelled) {
    Abort abort{cancelled};
    Pool& pool = this->pool();
    const std::lock_guard<std::mutex> turn(pool.turn);
    // For what the kernels and our own operations allocate in the pool's threads, where nothing may throw.
    require_memory((size_t{8} << 20) + (size_t{4} << 20) * n_threads_);
    ggml_cplan plan = ggml_graph_plan(graph, n_threads_, pool.threads);
    if (pool.work_size < plan.work_size) {
        pool.work_size = 0;
        pool.work.reset();
        pool.work.reset(new uint8_t[plan.work_size]);
        pool.work_size = plan.work_size;
    }
    plan.work_data = pool.work.get();
    plan.abort_callback = [](void* data) {
        const auto* abort = static_cast<const Abort*>(data);
        return abort->cancelled() || n_stops != abort->n_stops_before;
    };
    plan.abort_callback_data = &abort;
    const ggml_status status = ggml_graph_compute(graph, &plan);
    if (status == GGML_STATUS_ABORTED) throw Error(ErrorKind::cancelled, "cancelled");
    if (status == GGML_STATUS_ALLOC_FAILED)
        throw Error(ErrorKind::out_of_memory, "no memory for a step's work area");
    if (status != GGML_STATUS_SUCCESS)
        throw Error(ErrorKind::general, format("ggml failed with status %d", status));
}

void use_large_pages(ggml_backend_buffer_t buffer) {
#if defined(__linux__)
    constexpr uintptr_t page = uintptr_t{2} << 20;
    if (!buffer || !ggml_backend_buffer_is_host(buffer)) return;
    const auto data = reinterpret_cast<uintptr_t>(ggml_backend_buffer_get_base(buffer));
    const uintptr_t begin = (data + page - 1) / page * page;
    const uintptr_t end = (data + ggml_backend_buffer_get_size(buffer)) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: may fail
#else
    (void)buffer;
#endif
}

namespace {

void use_large_pages_under(ggml_cgraph* graph) {
    ggml_backend_buffer_t last = nullptr;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        ggml_backend_buffer_t buffer = ggml_graph_node(graph, i)->buffer;
        if (buffer != last) use_large_pages(buffer);
        last = buffer;
    }
}

}  // namespace

Workspace::Workspace(Engine& engine) : engine_(engine) {
    if (engine_.on_device()) return;  // a scheduler is made for the size of its first graph
    allocator_.reset(ggml_gallocr_new(engine_.buffer_type()));
    if (!allocator_) throw Error(ErrorKind::out_of_memory, "no memory for a session");
}

void Workspace::allocate(ggml_cgraph* graph, const std::vector<ggml_context_ptr>& inputs, const Kept& kept,
                         const char* what) {
    bool done = true;
    inputs_.resize(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i)
        done = done && place_inputs(static_cast<int32_t>(i) + kProcessor, inputs[i].get());
    done = done &&
           (engine_.on_device() ? schedule(graph, kept) : ggml_gallocr_alloc_graph(allocator_.get(), graph));
    if (!done) throw Error(ErrorKind::out_of_memory, format("no memory for %s", what));
    if (!engine_.on_device()) use_large_pages_under(graph);
}

bool Workspace::place_inputs(int32_t i_place, ggml_context* inputs) {
    if (!ggml_get_first_tensor(inputs)) return true;
    ggml_backend_buffer_type_t type = engine_.buffer_type(i_place);
    ggml_backend_buffer_ptr& buffer = inputs_[i_place - kProcessor];
    const size_t alignment = ggml_backend_buft_get_alignment(type);
    size_t needed = 0;
    for (ggml_tensor* t = ggml_get_first_tensor(inputs); t; t = ggml_get_next_tensor(inputs, t))
        needed += GGML_PAD(ggml_backend_buft_get_alloc_size(type, t), alignment);
    if (!buffer || ggml_backend_buffer_get_size(buffer.get()) < needed) {
        buffer.reset();
        buffer.reset(ggml_backend_buft_alloc_buffer(type, needed));
        if (!buffer) return false;
    }
    ggml_tallocr place = ggml_tallocr_new(buffer.get());
    for (ggml_tensor* t = ggml_get_first_tensor(inputs); t; t = ggml_get_next_tensor(inputs, t)) {
        if (ggml_tallocr_alloc(&place, t) != GGML_STATUS_SUCCESS) return false;
    }
    return true;
}

ggml_backend_t Workspace::backend_of(const ggml_tensor* weight) const {
    ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(weight->buffer);
    for (const ggml_backend_ptr& device : engine_.devices_) {
        if (ggml_backend_supports_buft(device.get(), type)) return device.get();
    }
    return engine_.cpu_.get();
}

bool Workspace::schedule(ggml_cgraph* graph, const Kept& kept) {
    const size_t needed = 2 * static_cast<size_t>(ggml_graph_size(graph));
    if (scheduler_size_ < needed) {
        std::vector<ggml_backend_t> backends;
        std::vector<ggml_backend_buffer_type_t> memory;
        for (const ggml_backend_ptr& device : engine_.devices_) {
            backends.push_back(device.get());
            memory.push_back(ggml_backend_get_default_buffer_type(device.get()));
        }
        // What goes to and from a GPU is moved faster where its driver has pinned the processor's memory.
        ggml_backend_buffer_type_t pinned =
            ggml_backend_dev_host_buffer_type(ggml_backend_get_device(backends.back()));
        backends.push_back(engine_.cpu_.get());
        memory.push_back(pinned ? pinned : engine_.buffer_type(kProcessor));
        scheduler_size_ = 0;
        scheduler_.reset(ggml_backend_sched_new(backends.data(), memory.data(),
                                                static_cast<int>(backends.size()), needed, false, false));
        if (!scheduler_) return false;
        scheduler_size_ = needed;
    }
    ggml_backend_sched_reset(scheduler_.get());
    for (const auto& [node, weight] : kept)
        ggml_backend_sched_set_tensor_backend(scheduler_.get(), node, backend_of(weight));
    return ggml_backend_sched_alloc_graph(scheduler_.get(), graph);
}

void Workspace::compute(ggml_cgraph* graph, const std::function<bool()>& cancelled) {
    if (!engine_.on_device()) {
        engine_.compute(graph, cancelled);
        return;
    }
    if (cancelled()) throw Error(ErrorKind::cancelled, "cancelled");
    require_success(ggml_backend_sched_graph_compute(scheduler_.get(), graph));
}

void Workspace::compute_nodes(ggml_cgraph* nodes, const std::function<bool()>& cancelled) {
    if (!engine_.on_device()) {
        engine_.compute(nodes, cancelled);
        return;
    }
    require_success(ggml_backend_graph_compute(engine_.devices_.back().get(), nodes));
}

void Workspace::require_success(ggml_status status) const {
    if (status == GGML_STATUS_SUCCESS) return;
    throw Error(ErrorKind::general, format("ggml failed with status %d on %s", status, engine_.name()));
}

}  // namespace pydiffusion
