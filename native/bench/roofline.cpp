#include "bench/roofline.h"

#include <thread>
#include <vector>

#include "backend/cpu/matmul.h"
#include "backend/graph_executor.h"
#include "backend/step_backend.h"
#include "ggml-alloc.h"
#include "quantization/quantize.h"
#include "util/error.h"
#include "util/timer.h"

namespace pydiffusion {

namespace {

uint64_t sum_words(const uint64_t* words, size_t n) {
    uint64_t lanes[8] = {};
    for (size_t i = 0; i + 8 <= n; i += 8) {
        for (size_t l = 0; l < 8; ++l) lanes[l] += words[i + l];
    }
    uint64_t sum = 0;
    for (const uint64_t lane : lanes) sum += lane;
    return sum;
}

}  // namespace

double measure_read_rate(int n_threads, const std::string& device) {
    const Backend backend(n_threads, device);
    if (backend.on_device()) return backend.step_backend().copy_rate();
    const size_t n_words = (size_t{256} << 20) / sizeof(uint64_t), n_per_thread = n_words / n_threads;
    const std::vector<uint64_t> memory(n_words, 1);
    std::vector<uint64_t> sums(n_threads);
    const double seconds = best_seconds([&] {
        std::vector<std::thread> threads;
        for (int i = 0; i < n_threads; ++i) {
            threads.emplace_back(
                [&, i] { sums[i] = sum_words(memory.data() + i * n_per_thread, n_per_thread); });
        }
        for (std::thread& thread : threads) thread.join();
    });
    for (const uint64_t sum : sums) {
        if (sum > n_per_thread)
            throw Error(ErrorKind::general,
                        "memory read back other values than were written: check the machine's memory");
    }
    return static_cast<double>(n_per_thread * n_threads * sizeof(uint64_t)) / seconds;
}

double measure_matrix_rate(int n_threads, ggml_type type, const std::string& device,
                           const std::string& kernels) {
    constexpr int64_t n = 4096, n_activations = 256, n_distinct_rows = 32;
    Backend backend(n_threads, device, kernels);
    GraphExecutor executor(backend);
    const int n_matmuls = backend.has_gpu() ? 64 : 1;  // a single one takes a GPU no longer than its launch
    std::vector<float> rows(n_distinct_rows * n);
    for (size_t i = 0; i < rows.size(); ++i)
        rows[i] = static_cast<float>(i * 2654435761u % 1000) / 1000.0f - 0.5f;
    std::vector<uint8_t> blocks(n_distinct_rows * ggml_row_size(type, n));
    const std::vector<float> importance(n, 1.0f);
    quantize_rows(type, rows.data(), n_distinct_rows, n, importance.data(), n_threads, blocks.data());

    const ggml_init_params params = {(16 + 2 * n_matmuls) * ggml_tensor_overhead() + ggml_graph_overhead(),
                                     nullptr, true};
    const ggml_context_ptr context(ggml_init(params));
    ggml_tensor* weight = ggml_new_tensor_2d(context.get(), type, n, n);
    ggml_tensor* activations = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, n, n_activations);
    gemm::Matmul matmul(context.get(), backend.kernel());
    std::vector<ggml_tensor*> results;
    ggml_cgraph* graph = ggml_new_graph(context.get());
    for (int i = 0; i < n_matmuls; ++i) {
        results.push_back(matmul.apply(weight, activations));
        ggml_build_forward_expand(graph, results.back());
    }
    const ggml_backend_buffer_ptr buffer(
        ggml_backend_alloc_ctx_tensors_from_buft(context.get(), backend.buffer_type()));
    if (!buffer)
        throw Error(ErrorKind::out_of_memory,
                    "out of memory: failed to allocate the matrices to measure matmul with");
    for (size_t at = 0; at < ggml_nbytes(weight); at += blocks.size()) {
        ggml_backend_tensor_set(weight, blocks.data(), at, blocks.size());
    }
    for (int64_t i = 0; i < n_activations; i += n_distinct_rows) {
        ggml_backend_tensor_set(activations, rows.data(), i * n * sizeof(float), rows.size() * sizeof(float));
    }
    return 2.0 * n * n * n_activations * n_matmuls /
           best_seconds([&] { executor.compute_nodes(graph, [] { return false; }); });
}

}  // namespace pydiffusion
