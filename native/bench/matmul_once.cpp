#include "bench/matmul_once.h"

#include "backend/backend.h"
#include "backend/cpu/matmul.h"
#include "backend/expert_nodes.h"
#include "backend/graph_executor.h"
#include "backend/repacked_weights.h"
#include "util/error.h"

namespace pydiffusion {
namespace gemm {

std::vector<float> matmul_once(const MatmulTask& task) {
    Backend backend(task.n_threads, task.device, task.kernels);
    GraphExecutor executor(backend);
    const ggml_context_ptr context(
        ggml_init({8 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true}));
    if (!context) throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate a ggml context");
    ggml_context* ctx = context.get();
    ggml_tensor* weight =
        ggml_new_tensor_3d(ctx, task.type, task.n_inner, task.n_rows / task.n_experts, task.n_experts);
    ggml_tensor* x =
        ggml_new_tensor_3d(ctx, GGML_TYPE_F32, task.n_inner, task.experts ? 1 : task.n_activations,
                           task.experts ? task.n_activations : 1);
    ggml_tensor* experts =
        task.experts ? ggml_new_tensor_2d(ctx, GGML_TYPE_I32, task.n_used, task.n_activations) : nullptr;
    Matmul matmul(ctx, backend.kernel());
    const bool repacked = experts && backend.repacks(weight);
    if (repacked) mark_repacked(weight);
    ExpertMatmuls expert_matmuls(ctx, backend);
    ggml_tensor* result = experts               ? expert_matmuls.apply(weight, x, experts)
                          : backend.on_device() ? ggml_matmul(ctx, weight, x)
                                                : matmul.apply(weight, x);
    if (!result) result = matmul.apply(weight, x, experts);
    const ggml_backend_buffer_ptr buffer(
        ggml_backend_alloc_ctx_tensors_from_buft(ctx, backend.buffer_type()));
    if (!buffer)
        throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate a matmul's tensors");
    std::vector<uint8_t> own(repacked ? ggml_nbytes(weight) : 0);
    const auto* rows = static_cast<const uint8_t*>(task.weights);
    if (repacked) repack_rows(task.type, rows, task.n_rows, task.n_inner, own.data());
    ggml_backend_tensor_set(weight, repacked ? own.data() : rows, 0, ggml_nbytes(weight));
    ggml_backend_tensor_set(x, task.x, 0, ggml_nbytes(x));
    if (experts) ggml_backend_tensor_set(experts, task.experts, 0, ggml_nbytes(experts));
    ggml_cgraph* graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, result);
    executor.compute_nodes(graph, [] { return false; });
    std::vector<float> values(ggml_nelements(result));
    ggml_backend_tensor_get(result, values.data(), 0, ggml_nbytes(result));
    return values;
}

}  // namespace gemm
}  // namespace pydiffusion
