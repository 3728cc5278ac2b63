// StepBackend with CUDA kernels. All sums are in a fixed order, so that a seed always gives the same text.
// Embedding rows are dequantized by ggml's kernels.
#include <cublas_v2.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "backend/cuda/step_kernels.cuh"
#include "backend/row_math.h"
#include "backend/step_backend.h"
#include "ggml-backend-impl.h"
#include "ggml-cuda/common.cuh"
#include "ggml-cuda/convert.cuh"
#include "ggml-cuda/getrows.cuh"
#include "util/error.h"
#include "util/timer.h"

namespace pydiffusion {

namespace {

constexpr int32_t kGatherRows = 4096;         // embedding rows gathered at a time
constexpr int64_t kDenseRowsInPlace = 32768;  // kDenseRows of a 16-bit embedding, which needs no conversion

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    (void)cudaGetLastError();
    if (status == cudaErrorMemoryAllocation)
        throw Error(ErrorKind::out_of_memory, format("out of GPU memory: %s failed", what));
    throw Error(ErrorKind::general, format("CUDA: %s failed: %s", what, cudaGetErrorString(status)));
}

void check(cublasStatus_t status, const char* what) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    throw Error(ErrorKind::general, format("cuBLAS: %s failed: %s", what, cublasGetStatusString(status)));
}

// Kernel launches return no status: reads the launch error, if any.
void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

unsigned blocks_of(int64_t n, int64_t size) { return static_cast<unsigned>((n + size - 1) / size); }

// --- owners of CUDA resources: the GPU must be current when they are created and destroyed ---

struct Release {
    void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
    void operator()(cublasHandle_t handle) const { cublasDestroy(handle); }
};

template <typename Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Release>;

Owned<cudaEvent_t> make_event() {
    cudaEvent_t event = nullptr;
    check(cudaEventCreate(&event), "creating an event");
    return Owned<cudaEvent_t>(event);
}

Owned<cublasHandle_t> make_cublas(cudaStream_t stream) {
    cublasHandle_t handle = nullptr;
    check(cublasCreate(&handle), "creating a handle");
    Owned<cublasHandle_t> owned(handle);
    check(cublasSetStream(handle, stream), "setting the stream");
    return owned;
}

struct DeviceMemory {
    static cudaError_t allocate(void** data, size_t n_bytes) { return cudaMalloc(data, n_bytes); }
    static cudaError_t release(void* data) { return cudaFree(data); }
};

// Of the host, for copies that don't make it wait.
struct PinnedMemory {
    static cudaError_t allocate(void** data, size_t n_bytes) { return cudaMallocHost(data, n_bytes); }
    static cudaError_t release(void* data) { return data ? cudaFreeHost(data) : cudaSuccess; }
};

// Memory that grows on demand and never shrinks.
template <typename T, typename Memory = DeviceMemory>
class Array {
  public:
    Array() = default;
    ~Array() { Memory::release(data_); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;

    T* reserve(int64_t n) {
        if (n > size_) {
            check(Memory::release(data_), "freeing memory");
            data_ = nullptr;
            size_ = 0;
            void* data = nullptr;
            check(Memory::allocate(&data, static_cast<size_t>(n) * sizeof(T)), "allocating a step's buffers");
            data_ = static_cast<T*>(data);
            size_ = n;
        }
        return data_;
    }
    T* data() const { return data_; }

  private:
    T* data_ = nullptr;
    int64_t size_ = 0;
};

bool is_16_bit(ggml_type type) { return type == GGML_TYPE_BF16 || type == GGML_TYPE_F16; }

// Whether sum_embeddings can read it; others are gathered by ggml's kernels.
bool can_sum_embeddings(const ggml_tensor* embedding) {
    return is_16_bit(embedding->type) && embedding->ne[0] % kPerLoad == 0 && embedding->nb[1] % 16 == 0 &&
           reinterpret_cast<uintptr_t>(embedding->data) % 16 == 0;
}

class CudaStepBackend : public StepBackend {
  public:
    explicit CudaStepBackend(ggml_backend_t backend)
        : ggml_(*static_cast<ggml_backend_cuda_context*>(backend->context)) {
        select_gpu();
        for (Owned<cudaEvent_t>* event : {&begin_, &end_, &counted_}) *event = make_event();
        cublas_ = make_cublas(stream());
    }
    // The members are destroyed after this, with the right GPU current.
    ~CudaStepBackend() override { cudaSetDevice(physical_gpu()); }

    void condition(const ggml_tensor* logits, const ggml_tensor* embedding, ggml_tensor* soft, int64_t n,
                   const StepState& state) override;
    void measure(ggml_tensor* logits, int64_t n, StepState& state) override;
    void pin(ggml_tensor* logits, int64_t position, int32_t token, float value,
             const StepState& state) override;
    double seconds_of(const std::function<void()>& work) override;
    double copy_rate() override;

  private:
    // Several ggml devices may share a GPU (GGML_CUDA_DEVICES).
    int physical_gpu() const { return ggml_cuda_info().devices[ggml_.device].physical_device; }
    // ggml's, so that all is in order with its graphs.
    cudaStream_t stream() { return ggml_.stream(); }
    void select_gpu() const { check(cudaSetDevice(physical_gpu()), "selecting the GPU"); }
    void sum(const ggml_tensor* logits, int64_t n, float temperature, const float* cap, row::Sums* sums);
    row::Sums* reserve_sums(const ggml_tensor* logits, int64_t n);
    void find_kept(const ggml_tensor* logits, int64_t n, const StepState& state);
    void sum_rows(const ggml_tensor* embedding, float* soft, int64_t n, float scale);
    void gather(const ggml_tensor* embedding, float* soft, int64_t n, float scale);
    void multiply(const float* logits, const ggml_tensor* embedding, float* soft, float scale);
    template <typename T>
    void multiply_as(cudaDataType_t type, const float* logits, const ggml_tensor* embedding, float* soft,
                     float scale);
    template <typename T>
    void upload(T* target, const std::vector<T>& values) {
        check(cudaMemcpyAsync(target, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice,
                              stream()),
              "copying to the GPU");
    }
    template <typename T>
    void download(T* target, const T* source, int64_t n) {
        check(cudaMemcpyAsync(target, source, n * sizeof(T), cudaMemcpyDeviceToHost, stream()),
              "copying from the GPU");
        finish("copying from the GPU");
    }
    void finish(const char* what) { check(cudaStreamSynchronize(stream()), what); }

    ggml_backend_cuda_context& ggml_;
    Owned<cudaEvent_t> begin_, end_, counted_;
    Owned<cublasHandle_t> cublas_;
    Array<float> u_, weights_, packed_weights_, rows_, dense_sums_;
    Array<Measure> measures_;
    Array<row::Sums> sums_;
    Array<row::Distribution> distributions_;
    Array<int32_t> n_kept_, tokens_, packed_tokens_, first_, positions_;
    Array<__half> embedding_;
    Array<char> probabilities_;
    Array<int32_t, PinnedMemory> n_kept_host_;
    std::vector<int32_t> first_host_, dense_host_;
};

// Sums the chunks of the first n rows of logits at a temperature, and caps them if cap isn't null.
void CudaStepBackend::sum(const ggml_tensor* logits, int64_t n, float temperature, const float* cap,
                          row::Sums* sums) {
    const int64_t n_vocab = logits->ne[0];
    const dim3 grid(blocks_of(row::n_chunks_of(n_vocab), kChunksPerBlock), static_cast<unsigned>(n));
    const auto kernel = cap ? sum_chunks<true> : sum_chunks<false>;
    kernel<<<grid, kChunksPerBlock * kLanes, 0, stream()>>>(static_cast<float*>(logits->data), n_vocab,
                                                            row::soft_cap(cap ? *cap : 1.0f),
                                                            row::scale_of(temperature), sums);
    check_launch("summing logits");
}

row::Sums* CudaStepBackend::reserve_sums(const ggml_tensor* logits, int64_t n) {
    return sums_.reserve(n * row::n_chunks_of(logits->ne[0]));
}

void CudaStepBackend::measure(ggml_tensor* logits, int64_t n, StepState& state) {
    state.n_summed = 0;
    select_gpu();
    const std::vector<float> u(state.u.begin(), state.u.begin() + n);
    upload(u_.reserve(n), u);
    auto* sums = state.sums ? static_cast<row::Sums*>(state.sums->data) : reserve_sums(logits, n);
    sum(logits, n, state.temperature, &state.soft_cap, sums);
    measure_rows<<<static_cast<unsigned>(n), kThreads, 0, stream()>>>(
        static_cast<const float*>(logits->data), logits->ne[0], sums, row::scale_of(state.temperature),
        u_.data(), measures_.reserve(n));
    check_launch("measuring logits");
    download(state.measures.data(), measures_.data(), n);
    if (!state.sums) return;
    state.n_summed = n;
    state.summed_temperature = state.temperature;
}

// Finds what each position keeps, and lists it where that is little. How much becomes known to the host after
// `counted_`.
void CudaStepBackend::find_kept(const ggml_tensor* logits, int64_t n, const StepState& state) {
    const int64_t n_vocab = logits->ne[0];
    const row::Sums* sums = nullptr;
    if (state.sums && n <= state.n_summed && state.summed_temperature == state.previous_temperature) {
        sums = static_cast<const row::Sums*>(state.sums->data);
    } else {
        row::Sums* own = reserve_sums(logits, n);
        sum(logits, n, state.previous_temperature, nullptr, own);
        sums = own;
    }
    const size_t shared_bytes = row::n_chunks_of(n_vocab) * sizeof(int32_t);
    find_mass<<<static_cast<unsigned>(n), kThreads, shared_bytes, stream()>>>(
        static_cast<const float*>(logits->data), n_vocab, sums, row::scale_of(state.previous_temperature),
        state.dropped_mass, distributions_.reserve(n), n_kept_.reserve(n), tokens_.reserve(n * kMaxGathered),
        weights_.reserve(n * kMaxGathered));
    check_launch("selecting tokens for self-conditioning");
    check(cudaMemcpyAsync(n_kept_host_.reserve(n), n_kept_.data(), n * sizeof(int32_t),
                          cudaMemcpyDeviceToHost, stream()),
          "copying from the GPU");
    check(cudaEventRecord(counted_.get(), stream()), "recording an event");
}

void CudaStepBackend::condition(const ggml_tensor* logits, const ggml_tensor* embedding, ggml_tensor* soft,
                                int64_t n, const StepState& state) {
    select_gpu();
    const bool sums_in_place = can_sum_embeddings(embedding);
    auto* out = static_cast<float*>(soft->data);
    if (!state.self_conditioning || !sums_in_place) {
        const size_t n_bytes = n * soft->ne[0] * sizeof(float);
        check(cudaMemsetAsync(out, 0, n_bytes, stream()), "clearing the soft embeddings");
    }
    // What measure() needs: out of memory there, the logits of the step before would be lost.
    u_.reserve(n);
    measures_.reserve(n);
    if (!state.self_conditioning) return;
    find_kept(logits, n, state);
    // Meanwhile the host learns which positions have no list.
    if (sums_in_place) sum_rows(embedding, out, n, state.embedding_scale);
    check(cudaEventSynchronize(counted_.get()), "selecting tokens for self-conditioning");
    const int32_t* n_kept = n_kept_host_.data();
    first_host_.assign(1, 0);
    dense_host_.clear();
    for (int64_t t = 0; t < n; ++t) {
        const bool dense = n_kept[t] > kMaxGathered;
        if (dense) dense_host_.push_back(static_cast<int32_t>(t));
        first_host_.push_back(first_host_.back() + (dense ? 0 : n_kept[t]));
    }
    if (!sums_in_place && first_host_.back() > 0) gather(embedding, out, n, state.embedding_scale);
    if (!dense_host_.empty())
        multiply(static_cast<const float*>(logits->data), embedding, out, state.embedding_scale);
}

// The positions' lists are summed straight from a 16-bit embedding.
void CudaStepBackend::sum_rows(const ggml_tensor* embedding, float* soft, int64_t n, float scale) {
    const int64_t d = embedding->ne[0], stride = static_cast<int64_t>(embedding->nb[1]) / 2;
    const dim3 grid(blocks_of(d, kGatherElements), static_cast<unsigned>(n));
    const auto launch = [&](auto* rows) {
        sum_embeddings<<<grid, kGatherWarps * kLanes, 0, stream()>>>(soft, rows, stride, d, n_kept_.data(),
                                                                     tokens_.data(), weights_.data(), scale);
    };
    if (embedding->type == GGML_TYPE_BF16) {
        launch(static_cast<const cuda::Bfloat16*>(embedding->data));
    } else {
        launch(static_cast<const __half*>(embedding->data));
    }
    check_launch("summing embeddings");
}

void CudaStepBackend::gather(const ggml_tensor* embedding, float* soft, int64_t n, float scale) {
    const int64_t d = embedding->ne[0];
    const int32_t total = first_host_.back();
    upload(first_.reserve(n + 1), first_host_);
    pack_lists<<<static_cast<unsigned>(n), 128, 0, stream()>>>(first_.data(), tokens_.data(), weights_.data(),
                                                               packed_tokens_.reserve(total),
                                                               packed_weights_.reserve(total));
    check_launch("packing token lists");
    float* rows = rows_.reserve(kGatherRows * d);
    const dim3 grid(static_cast<unsigned>(n), blocks_of(d, 256));
    for (int32_t from = 0; from < total; from += kGatherRows) {
        const int32_t to = std::min(total, from + kGatherRows);
        const size_t n_rows = static_cast<size_t>(to - from),
                     row_bytes = static_cast<size_t>(d) * sizeof(float);
        get_rows_cuda(embedding->data, embedding->type, packed_tokens_.data() + from, rows, GGML_TYPE_F32, d,
                      embedding->nb[1], embedding->nb[2], embedding->nb[3], to - from, 1, 1, sizeof(int32_t),
                      n_rows * sizeof(int32_t), n_rows * sizeof(int32_t), row_bytes, n_rows * row_bytes,
                      n_rows * row_bytes, stream());
        add_gathered<<<grid, 256, 0, stream()>>>(soft, rows, packed_weights_.data(), first_.data(), from, to,
                                                 d, scale);
        check_launch("summing embeddings");
    }
}

void CudaStepBackend::multiply(const float* logits, const ggml_tensor* embedding, float* soft, float scale) {
    if (embedding->type == GGML_TYPE_BF16) {
        multiply_as<cuda::Bfloat16>(CUDA_R_16BF, logits, embedding, soft, scale);
    } else {
        multiply_as<__half>(CUDA_R_16F, logits, embedding, soft, scale);
    }
}

// T: type of the matmul's operands. Embeddings of other types than this are converted to float16.
template <typename T>
void CudaStepBackend::multiply_as(cudaDataType_t type, const float* logits, const ggml_tensor* embedding,
                                  float* soft, float scale) {
    const int64_t d = embedding->ne[0], n_vocab = embedding->ne[1];
    const auto n_dense = static_cast<int64_t>(dense_host_.size());
    const bool in_place = is_16_bit(embedding->type);
    const to_fp16_cuda_t to_half = in_place ? nullptr : ggml_get_to_fp16_cuda(embedding->type);
    const int64_t n_at_once = in_place ? kDenseRowsInPlace : kDenseRows;
    upload(positions_.reserve(n_dense), dense_host_);
    __half* chunk = in_place ? nullptr : embedding_.reserve(n_at_once * d);
    T* probabilities = reinterpret_cast<T*>(probabilities_.reserve(n_at_once * n_dense * sizeof(T)));
    float* sums = dense_sums_.reserve(n_dense * d);
    for (int64_t from = 0; from < n_vocab; from += n_at_once) {
        const int64_t n_rows = std::min(n_at_once, n_vocab - from);
        const char* source = static_cast<const char*>(embedding->data) + from * embedding->nb[1];
        if (!in_place) to_half(source, chunk, n_rows * d, stream());
        const dim3 grid(blocks_of(n_rows, kProbabilities), static_cast<unsigned>(n_dense));
        const auto kernel = n_vocab % 4 == 0 ? dense_probabilities<T, 4> : dense_probabilities<T, 1>;
        kernel<<<grid, kProbabilityThreads, 0, stream()>>>(probabilities, logits, distributions_.data(),
                                                           positions_.data(), n_vocab, from, n_rows);
        check_launch("computing probabilities");
        const void* rows = in_place ? static_cast<const void*>(source) : chunk;
        const float one = 1.0f, add = from == 0 ? 0.0f : 1.0f;
        check(cublasGemmEx(cublas_.get(), CUBLAS_OP_N, CUBLAS_OP_N, static_cast<int>(d),
                           static_cast<int>(n_dense), static_cast<int>(n_rows), &one, rows, type,
                           static_cast<int>(d), probabilities, type, static_cast<int>(n_rows), &add, sums,
                           CUDA_R_32F, static_cast<int>(d), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
              "the dense self-conditioning GEMM");
    }
    const dim3 grid(static_cast<unsigned>(n_dense), blocks_of(d, 256));
    scatter_rows<<<grid, 256, 0, stream()>>>(soft, sums, positions_.data(), d, scale / kHalfScale);
    check_launch("scattering soft embeddings");
}

void CudaStepBackend::pin(ggml_tensor* logits, int64_t position, int32_t token, float value,
                          const StepState& state) {
    select_gpu();
    const int64_t n_vocab = logits->ne[0];
    auto* sums = state.sums ? static_cast<row::Sums*>(state.sums->data) : nullptr;
    fill_row<<<blocks_of(n_vocab, 256), 256, 0, stream()>>>(
        static_cast<float*>(logits->data) + position * n_vocab, n_vocab, token, value,
        sums ? sums + position * row::n_chunks_of(n_vocab) : nullptr);
    check_launch("pinning a token");
    finish("pinning a token");
}

double CudaStepBackend::seconds_of(const std::function<void()>& work) {
    select_gpu();
    check(cudaEventRecord(begin_.get(), stream()), "timing");
    work();
    select_gpu();  // ggml may have selected another
    check(cudaEventRecord(end_.get(), stream()), "timing");
    check(cudaEventSynchronize(end_.get()), "timing");
    float milliseconds = 0.0f;
    check(cudaEventElapsedTime(&milliseconds, begin_.get(), end_.get()), "timing");
    return milliseconds / 1e3;
}

double CudaStepBackend::copy_rate() {
    constexpr int64_t n_bytes = int64_t{1} << 30;
    constexpr int n_copies = 10;
    select_gpu();
    Array<char> source, target;
    check(cudaMemsetAsync(source.reserve(n_bytes), 1, n_bytes, stream()), "filling");
    target.reserve(n_bytes);
    const double seconds = best_seconds([&] {
        for (int i = 0; i < n_copies; ++i) {
            check(cudaMemcpyAsync(target.data(), source.data(), n_bytes, cudaMemcpyDeviceToDevice, stream()),
                  "copying");
        }
        finish("copying");
    });
    return 2.0 * n_copies * static_cast<double>(n_bytes) / seconds;
}

}  // namespace

std::unique_ptr<StepBackend> make_cuda_step_backend(ggml_backend_t backend) {
    return std::make_unique<CudaStepBackend>(backend);
}

}  // namespace pydiffusion
