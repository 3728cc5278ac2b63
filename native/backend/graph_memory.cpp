#include "backend/graph_memory.h"

#include "util/error.h"

namespace pydiffusion {

void* GraphMemory::reserve(size_t n_bytes) {
    if (n_bytes_ < n_bytes || n_bytes_ > 2 * n_bytes) {  // not much more than needed: memory may be short
        memory_.reset();
        memory_.reset(std::malloc(n_bytes));
        n_bytes_ = memory_ ? n_bytes : 0;
    }
    return memory_.get();
}

ggml_context_ptr new_graph_context(size_t n_nodes, GraphMemory* memory) {
    ggml_init_params params = {n_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false),
                               nullptr, true};
    require_memory((size_t{16} << 20) + 4 * params.mem_size);  // the allocator's tables need memory too
    ggml_context_ptr context;
    if (memory) params.mem_buffer = memory->reserve(params.mem_size);
    if (!memory || params.mem_buffer) context.reset(ggml_init(params));
    if (!context) throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate a graph");
    return context;
}

}  // namespace pydiffusion
