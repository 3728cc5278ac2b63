// pydiffusion._native.testing: individual kernels and operations, for tests and benchmarks only.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>

#include "backend/attention_node.h"
#include "backend/cpu/amx/weighted_sums.h"
#include "backend/graph_executor.h"
#include "backend/ops/ggml_attention.h"
#include "backend/step_backend.h"
#include "bench/matmul_once.h"
#include "bindings/bindings.h"
#include "ggml-cpp.h"
#include "model/architecture.h"
#include "sampler/logits.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

// Matrices in a backend's memory, as inputs of kernels and graphs.
class Matrices {
  public:
    explicit Matrices(const Backend& backend) : type_(backend.buffer_type()) {}

    ggml_tensor* add(const Array2<float>& values) {
        return add(values.data(), values.shape(0), values.shape(1));
    }
    ggml_tensor* add(const float* values, size_t n_rows, size_t n_per_row, ggml_type type = GGML_TYPE_F32) {
        contexts_.emplace_back(ggml_init({2 * ggml_tensor_overhead(), nullptr, true}));
        if (!contexts_.back())
            throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate a tensor");
        ggml_tensor* tensor = ggml_new_tensor_2d(
            contexts_.back().get(), type, static_cast<int64_t>(n_per_row), static_cast<int64_t>(n_rows));
        buffers_.emplace_back(ggml_backend_alloc_ctx_tensors_from_buft(contexts_.back().get(), type_));
        if (!buffers_.back())
            throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate a tensor");
        if (values) ggml_backend_tensor_set(tensor, values, 0, ggml_nbytes(tensor));
        return tensor;
    }
    static Numpy2<float> fetch(const ggml_tensor* tensor) {
        const auto values = new_numpy<float>(tensor->ne[1], tensor->ne[0]);
        ggml_backend_tensor_get(tensor, values.data(), 0, ggml_nbytes(tensor));
        return values;
    }

  private:
    ggml_backend_buffer_type_t type_;
    std::vector<ggml_context_ptr> contexts_;
    std::vector<ggml_backend_buffer_ptr> buffers_;
};

const Backend& require_step_backend(const Backend& backend) {
    if (!backend.on_device())
        throw Error(ErrorKind::argument, "the CPU has no step kernels: choose a device");
    return backend;
}

// Caps and measures logits on a device or the CPU -> capped logits, argmax, entropy, sampled.
nb::tuple measure_on(const std::string& device, const Array2<float>& logits, float cap, float temperature,
                     const Array1<float>& u) {
    const size_t n = logits.shape(0);
    if (u.shape(0) != n || logits.shape(1) == 0)
        throw Error(ErrorKind::argument, "u and logits have incompatible shapes");
    StepState state;
    state.soft_cap = cap;
    state.temperature = temperature;
    state.u = to_vector(u);
    state.measures.resize(n);
    const Backend backend(1, device);
    Matrices matrices(backend);
    ggml_tensor* rows = matrices.add(logits);
    if (backend.on_device()) {
        backend.step_backend().measure(rows, static_cast<int64_t>(n), state);
    } else {
        for (size_t i = 0; i < n; ++i)
            state.measures[i] =
                cap_and_measure_row(static_cast<float*>(rows->data) + i * logits.shape(1),
                                    static_cast<int64_t>(logits.shape(1)), cap, temperature, state.u[i]);
    }
    std::vector<int32_t> argmax, sampled;
    std::vector<float> entropy;
    for (const Measure& m : state.measures) {
        argmax.push_back(m.argmax);
        sampled.push_back(m.sampled);
        entropy.push_back(m.entropy);
    }
    return nb::make_tuple(Matrices::fetch(rows), to_numpy(argmax), to_numpy(entropy), to_numpy(sampled));
}

// Soft embedding by a device's kernels: logits (n, n_vocab), embedding (n_vocab, d) -> (n, d).
Numpy2<float> condition_on(const std::string& device, const Array2<float>& logits,
                           const Array2<float>& embedding, float temperature, float dropped_mass) {
    const size_t n = logits.shape(0);
    if (embedding.shape(0) != logits.shape(1))
        throw Error(ErrorKind::argument, "embedding and logits have incompatible shapes");
    StepState state;
    state.self_conditioning = true;
    state.previous_temperature = temperature;
    state.dropped_mass = dropped_mass;
    const Backend backend(1, device);
    Matrices matrices(backend);
    ggml_tensor* soft = matrices.add(nullptr, n, embedding.shape(1));
    StepBackend& steps = require_step_backend(backend).step_backend();
    const ggml_tensor *rows = matrices.add(logits), *embeddings = matrices.add(embedding);
    steps.seconds_of([&] {  // waits for it
        steps.condition(rows, embeddings, soft, static_cast<int64_t>(n), state);
    });
    return Matrices::fetch(soft);
}

// Attention on a device: q (n_tokens, n_head * head_dim), k and v (n_rows, n_head_kv * head_dim), stored in a
// cache of `type` first -> (n_tokens, n_head * head_dim). Rows from n_visible on are masked padding. kernel:
// "flash" (ggml's), "matmul" or "own". window: 0, or of causal attention, where row 0 is position 0 and the
// first token's is given.
Numpy2<float> attend_on(const std::string& device, const Array2<float>& q, const Array2<float>& k,
                        const Array2<float>& v, int64_t head_dim, const std::string& type_name,
                        int64_t n_visible, const std::string& kernel, int32_t position, int32_t window) {
    const size_t n_tokens = q.shape(0), n_rows = k.shape(0), width = k.shape(1);
    const ggml_type type = type_by_name(type_name);
    if (n_tokens == 0 || n_rows == 0 || v.shape(0) != n_rows || v.shape(1) != width || head_dim < 1 ||
        q.shape(1) % head_dim != 0 || width % head_dim != 0 || q.shape(1) % width != 0 ||
        head_dim % ggml_blck_size(type) != 0 || n_visible < 1 || n_visible > static_cast<int64_t>(n_rows))
        throw Error(ErrorKind::argument, "q, k, v and their type have incompatible shapes");
    Backend backend(1, device);
    require_step_backend(backend);
    if (backend.n_devices() != 1) throw Error(ErrorKind::argument, "device must name a single device");
    Matrices matrices(backend);
    const ggml_context_ptr context(
        ggml_init({32 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true}));
    std::vector<ggml_context_ptr> inputs(2);  // the CPU's, the device's
    for (ggml_context_ptr& one : inputs) one.reset(ggml_init({ggml_tensor_overhead(), nullptr, true}));
    if (!context || !inputs[0] || !inputs[1])
        throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate a graph");
    ggml_context* ctx = context.get();
    ggml_cgraph* graph = ggml_new_graph(ctx);
    const auto store = [&](const Array2<float>& rows) {
        ggml_tensor* cache = matrices.add(nullptr, n_rows, width, type);
        ggml_build_forward_expand(graph, ggml_cpy(ctx, matrices.add(rows), cache));
        return ggml_view_3d(ctx, cache, head_dim, cache->ne[1], cache->ne[0] / head_dim, cache->nb[1],
                            ggml_row_size(type, head_dim), 0);
    };
    ggml_tensor *keys = store(k), *values = store(v);
    ggml_tensor* queries = ggml_reshape_3d(ctx, matrices.add(q), head_dim,
                                           static_cast<int64_t>(q.shape(1)) / head_dim, q.shape(0));
    const Causal of_tokens = {0, position, window}, *causal = window > 0 ? &of_tokens : nullptr;
    const ggml_ops::Mask mask = {ggml_new_tensor_2d(inputs[1].get(), GGML_TYPE_F16, n_rows, n_tokens),
                                 n_visible, causal};
    ggml_tensor* result = nullptr;
    if (kernel == "own") {
        keys->ne[1] = values->ne[1] = n_visible;
        if (!backend.attends(queries, keys, values))
            throw Error(ErrorKind::argument, device + " has no attention kernel of ours for this");
        result = attend_by_kernel(ctx, queries, keys, values, causal, GGML_TYPE_F32);
    } else {
        result = kernel == "matmul" ? ggml_ops::attend_by_matmul(ctx, queries, keys, values, mask)
                                    : ggml_ops::attend(ctx, backend, queries, keys, values, mask);
    }
    ggml_set_output(result);
    ggml_build_forward_expand(graph, result);
    GraphExecutor executor(backend);
    executor.allocate(graph, inputs, {}, "attention");
    ggml_ops::fill(mask);
    executor.compute(graph, [] { return false; });
    return Matrices::fetch(result);
}

// x (n, n_inner) times rows of weights (n_rows, bytes) of a type -> (n, n_rows). With experts, I32 (n,
// n_used), the rows are n_experts matrices one after the other, and the result is (n, n_used * n_rows /
// n_experts).
Numpy2<float> matmul(const std::string& kernels, const Array2<uint8_t>& rows, const std::string& type_name,
                     const Array2<float>& x, const std::optional<Array2<int32_t>>& experts, int64_t n_experts,
                     int n_threads, const std::string& device) {
    const ggml_type type = type_by_name(type_name);
    gemm::MatmulTask task;
    task.device = device;
    task.kernels = kernels;
    task.n_threads = n_threads;
    task.type = type;
    task.n_inner = static_cast<int64_t>(x.shape(1));
    task.n_rows = static_cast<int64_t>(rows.shape(0));
    task.n_activations = static_cast<int64_t>(x.shape(0));
    if (task.n_inner < 1 || task.n_inner % ggml_blck_size(type) != 0 ||
        ggml_row_size(type, task.n_inner) != rows.shape(1))
        throw Error(ErrorKind::argument, "x and the rows have different lengths");
    if (n_experts < 1 || n_threads < 1 || task.n_rows < 1 || task.n_activations < 1 ||
        task.n_rows % n_experts != 0 || (experts && experts->shape(0) != x.shape(0)))
        throw Error(ErrorKind::argument, "an operand is empty, or experts have an incompatible shape");
    task.weights = rows.data();
    task.x = x.data();
    if (experts) {
        task.experts = experts->data();
        task.n_used = static_cast<int64_t>(experts->shape(1));
        task.n_experts = n_experts;
        for (size_t i = 0; i < experts->size(); ++i) {
            if (experts->data()[i] < 0 || experts->data()[i] >= n_experts)
                throw Error(ErrorKind::argument, format("there is no expert %d", experts->data()[i]));
        }
    }
    std::vector<float> result;
    {
        const WithoutGil release;
        result = gemm::matmul_once(task);
    }
    const size_t width = result.size() / x.shape(0);
    return to_numpy(std::move(result), x.shape(0), width);
}

// p (n_tokens, n_rows) times rows of an embedding (n_rows, bytes), by the AMX matmul of dense
// self-conditioning -> (n_tokens, n_inner), n_inner <= gemm::kSoftDims.
Numpy2<float> weighted_sums(const Array2<float>& p, const Array2<uint8_t>& rows, const std::string& type_name,
                            int64_t n_inner) {
    const ggml_type type = type_by_name(type_name);
    const gemm::Kernel kernel = gemm::kernel_by_name("amx");
    const auto n_tokens = static_cast<int64_t>(p.shape(0)), n_rows = static_cast<int64_t>(p.shape(1));
    if (n_tokens < 1 || n_rows < 1 || rows.shape(0) != p.shape(1) || n_inner < 1 ||
        n_inner > gemm::kSoftDims || !gemm::can_unpack(type, n_inner) ||
        n_inner % ggml_blck_size(type) != 0 || ggml_row_size(type, n_inner) != rows.shape(1))
        throw Error(ErrorKind::argument, "p, the rows and their type have incompatible shapes");
    std::vector<float> sums(n_tokens * n_inner);
    {
        const gemm::KernelScope ready(kernel);
        gemm::WeightedSums soft(n_tokens);
        for (int64_t first = 0; first < n_rows; first += gemm::kSoftRows) {
            std::vector<const float*> of_token(n_tokens);
            for (int64_t t = 0; t < n_tokens; ++t) of_token[t] = p.data() + t * n_rows + first;
            const auto* data = reinterpret_cast<const char*>(rows.data()) + first * rows.shape(1);
            soft.add(of_token.data(), n_tokens,
                     {type, data, rows.shape(1), std::min(gemm::kSoftRows, n_rows - first), 0, n_inner});
        }
        for (int64_t t = 0; t < n_tokens; ++t) soft.add_to(sums.data() + t * n_inner, t, n_inner);
    }
    return to_numpy(std::move(sums), p.shape(0), n_inner);
}

}  // namespace

void bind_testing(nb::module_& parent) {
    nb::module_ m =
        parent.def_submodule("testing", "Individual kernels and operations, for tests and benchmarks only.");
    m.def("measure_on", measure_on, nb::arg("device"), nb::arg("logits").noconvert(), nb::arg("cap"),
          nb::arg("temperature"), nb::arg("u").noconvert(),
          "Capped logits, argmax, entropy and sampled tokens, computed by a device's kernel.");
    m.def("condition_on", condition_on, nb::arg("device"), nb::arg("logits").noconvert(),
          nb::arg("embedding").noconvert(), nb::arg("temperature"), nb::arg("dropped_mass"),
          "Soft embedding, computed by a device's kernels.");
    m.def("attend_on", attend_on, nb::arg("device"), nb::arg("q").noconvert(), nb::arg("k").noconvert(),
          nb::arg("v").noconvert(), nb::arg("head_dim"), nb::arg("type"), nb::arg("n_visible"),
          nb::arg("kernel") = "flash", nb::arg("position") = 0, nb::arg("window") = 0,
          "Attention over a KV cache of a type, computed by a device's graph.");
    m.def("matmul", matmul, nb::arg("kernels"), nb::arg("rows").noconvert(), nb::arg("type"),
          nb::arg("x").noconvert(), nb::arg("experts").noconvert() = nb::none(), nb::arg("n_experts") = 1,
          nb::arg("n_threads") = 1, nb::arg("device") = "cpu",
          "Activations times rows of weights, by the matmuls of a model's graphs.");
    m.attr("toy_architecture") =
        find_architecture("masked-toy") != nullptr;  // built with PYDIFFUSION_TESTING
    m.def("weighted_sums", weighted_sums, nb::arg("p").noconvert(), nb::arg("rows").noconvert(),
          nb::arg("type"), nb::arg("n_inner"),
          "Sums of embedding rows weighted by probabilities, computed with AMX.");
}

}  // namespace pydiffusion
