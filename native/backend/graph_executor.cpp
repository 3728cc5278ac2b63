#include "backend/graph_executor.h"

#include "ggml-alloc.h"
#include "util/error.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pydiffusion {

void use_large_pages(ggml_backend_buffer_t buffer) {
#if defined(__linux__)
    constexpr uintptr_t page = uintptr_t{2} << 20;
    if (!buffer || !ggml_backend_buffer_is_host(buffer)) return;
    const auto data = reinterpret_cast<uintptr_t>(ggml_backend_buffer_get_base(buffer));
    const uintptr_t begin = (data + page - 1) / page * page;
    const uintptr_t end = (data + ggml_backend_buffer_get_size(buffer)) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: may fail
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

GraphExecutor::GraphExecutor(Backend& backend) : backend_(backend) {
    if (backend_.on_device()) return;  // schedule() creates the scheduler, by graph size
    allocator_.reset(ggml_gallocr_new(backend_.buffer_type()));
    if (!allocator_)
        throw Error(ErrorKind::out_of_memory, "out of memory: failed to create a graph allocator");
}

void GraphExecutor::allocate(ggml_cgraph* graph, const std::vector<ggml_context_ptr>& inputs,
                             const Pinned& pinned, const char* what) {
    bool done = true;
    inputs_.resize(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i)
        done = done && allocate_inputs(static_cast<int32_t>(i) + kCpuDevice, inputs[i].get());
    done = done && (backend_.on_device() ? schedule(graph, pinned)
                                         : ggml_gallocr_alloc_graph(allocator_.get(), graph));
    if (!done)
        throw Error(ErrorKind::out_of_memory,
                    format("out of memory: failed to allocate memory for %s", what));
    if (!backend_.on_device()) use_large_pages_under(graph);
}

bool GraphExecutor::allocate_inputs(int32_t device, ggml_context* inputs) {
    if (!ggml_get_first_tensor(inputs)) return true;
    ggml_backend_buffer_type_t type = backend_.buffer_type(device);
    ggml_backend_buffer_ptr& buffer = inputs_[device - kCpuDevice];
    const size_t alignment = ggml_backend_buft_get_alignment(type);
    size_t needed = 0;
    for (ggml_tensor* t = ggml_get_first_tensor(inputs); t; t = ggml_get_next_tensor(inputs, t))
        needed += GGML_PAD(ggml_backend_buft_get_alloc_size(type, t), alignment);
    if (!buffer || ggml_backend_buffer_get_size(buffer.get()) < needed) {
        buffer.reset();
        buffer.reset(ggml_backend_buft_alloc_buffer(type, needed));
        if (!buffer) return false;
    }
    ggml_tallocr allocator = ggml_tallocr_new(buffer.get());
    for (ggml_tensor* t = ggml_get_first_tensor(inputs); t; t = ggml_get_next_tensor(inputs, t)) {
        if (ggml_tallocr_alloc(&allocator, t) != GGML_STATUS_SUCCESS) return false;
    }
    return true;
}

ggml_backend_t GraphExecutor::backend_of(const ggml_tensor* weight) const {
    ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(weight->buffer);
    for (const ggml_backend_ptr& device : backend_.devices_) {
        if (ggml_backend_supports_buft(device.get(), type)) return device.get();
    }
    return backend_.cpu_.get();
}

bool GraphExecutor::schedule(ggml_cgraph* graph, const Pinned& pinned) {
    const size_t needed = 2 * static_cast<size_t>(ggml_graph_size(graph));
    if (scheduler_size_ < needed) {
        std::vector<ggml_backend_t> backends;
        std::vector<ggml_backend_buffer_type_t> buffer_types;
        for (const ggml_backend_ptr& device : backend_.devices_) {
            backends.push_back(device.get());
            buffer_types.push_back(ggml_backend_get_default_buffer_type(device.get()));
        }
        // Copies to and from a GPU are faster in host memory that its driver has pinned.
        ggml_backend_buffer_type_t pinned_type =
            ggml_backend_dev_host_buffer_type(ggml_backend_get_device(backends.back()));
        backends.push_back(backend_.cpu_.get());
        buffer_types.push_back(pinned_type ? pinned_type : backend_.buffer_type(kCpuDevice));
        scheduler_size_ = 0;
        scheduler_.reset(ggml_backend_sched_new(backends.data(), buffer_types.data(),
                                                static_cast<int>(backends.size()), needed, false, false));
        if (!scheduler_) return false;
        scheduler_size_ = needed;
    }
    ggml_backend_sched_reset(scheduler_.get());
    for (const auto& [node, weight] : pinned)
        ggml_backend_sched_set_tensor_backend(scheduler_.get(), node, backend_of(weight));
    return ggml_backend_sched_alloc_graph(scheduler_.get(), graph);
}

void GraphExecutor::launch(ggml_cgraph* graph, const std::function<bool()>& cancelled) {
    if (!backend_.on_device()) {
        backend_.compute(graph, cancelled);
        return;
    }
    if (cancelled()) throw Error(ErrorKind::cancelled, "cancelled");
    require_success(ggml_backend_sched_graph_compute_async(scheduler_.get(), graph));
}

void GraphExecutor::compute(ggml_cgraph* graph, const std::function<bool()>& cancelled) {
    launch(graph, cancelled);
    finish();
}

void GraphExecutor::finish() {
    if (scheduler_) ggml_backend_sched_synchronize(scheduler_.get());
}

void GraphExecutor::compute_nodes(ggml_cgraph* nodes, const std::function<bool()>& cancelled) {
    if (!backend_.on_device()) {
        backend_.compute(nodes, cancelled);
        return;
    }
    require_success(ggml_backend_graph_compute(backend_.devices_.back().get(), nodes));
}

void GraphExecutor::require_success(ggml_status status) const {
    if (status == GGML_STATUS_SUCCESS) return;
    throw Error(ErrorKind::general, format("ggml failed with status %d on %s", status, backend_.name()));
}

}  // namespace pydiffusion
