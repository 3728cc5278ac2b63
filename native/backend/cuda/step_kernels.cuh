// The kernels of CudaStepBackend: device code only, which the tests also compile for the CPU
// (native/tests/cuda_emulation). Internal linkage: each source file that includes this has its own.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "backend/cuda/bfloat16.cuh"
#include "backend/cuda/logits_kernels.cuh"

namespace pydiffusion {

namespace {

constexpr float kHalfScale = 16384.0f;  // scales 16-bit probabilities: 1e-8 is then no subnormal float16

// --- self-conditioning of positions that keep few tokens, with a 16-bit embedding ---

constexpr int kGatherWarps = 8, kPerLoad = 8;       // numbers that a lane loads together
constexpr int kGatherElements = kLanes * kPerLoad;  // of a block
constexpr int kRowsTogether = 4;                    // that a warp has under way

// Adds weight times eight numbers.
__device__ __forceinline__ void add_eight(float (&sum)[kPerLoad], uint4 eight, float weight, const __half*) {
    const uint32_t pairs[] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int j = 0; j < kPerLoad; ++j)
        sum[j] += weight * cuda::half_to_float(static_cast<uint16_t>(pairs[j / 2] >> j % 2 * 16));
}

__device__ __forceinline__ void add_eight(float (&sum)[kPerLoad], uint4 eight, float weight,
                                          const cuda::Bfloat16*) {
    const uint32_t pairs[] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int j = 0; j < kPerLoad; ++j)
        sum[j] += weight * __uint_as_float(j % 2 ? pairs[j / 2] & 0xffff0000u : pairs[j / 2] << 16);
}

// soft[:, t] = scale * weighted sum of the embeddings of t's tokens, for each position with a list. Each warp
// sums every kGatherWarps-th entry in the list's order, then the warps are added. d: a multiple of kPerLoad;
// stride: of the embedding's rows. Grid: kGatherElements elements, positions.
template <typename T>
__global__ void __launch_bounds__(kGatherWarps* kLanes)
    sum_embeddings(float* soft, const T* embedding, int64_t stride, int64_t d, const int32_t* n_kept,
                   const int32_t* tokens, const float* weights, float scale) {
    __shared__ float sums[kGatherWarps][kGatherElements];
    const int32_t n = n_kept[blockIdx.y];
    if (n > kMaxGathered) return;
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kGatherElements;
    const T* own = embedding + first + lane * kPerLoad;
    const bool has_elements = first + lane * kPerLoad < d;
    const int64_t list = static_cast<int64_t>(blockIdx.y) * kMaxGathered;
    float sum[kPerLoad] = {};
    for (int32_t base = warp; base < n; base += kGatherWarps * kLanes) {
        const int32_t at = base + lane * kGatherWarps;
        const int32_t own_token = at < n ? tokens[list + at] : 0;
        const float own_weight = at < n ? weights[list + at] : 0.0f;
        const int n_rows = min(kLanes, (n - base + kGatherWarps - 1) / kGatherWarps);
        for (int r = 0; r < n_rows; r += kRowsTogether) {
            uint4 rows[kRowsTogether];
#pragma unroll
            for (int j = 0; j < kRowsTogether; ++j) {
                const int64_t token = __shfl_sync(kAllLanes, own_token, r + j);
                rows[j] = make_uint4(0, 0, 0, 0);
                if (r + j < n_rows && has_elements)
                    rows[j] = *reinterpret_cast<const uint4*>(own + token * stride);
            }
#pragma unroll
            for (int j = 0; j < kRowsTogether; ++j)
                add_eight(sum, rows[j], __shfl_sync(kAllLanes, own_weight, r + j), own);
        }
    }
#pragma unroll
    for (int j = 0; j < kPerLoad; ++j) sums[warp][lane * kPerLoad + j] = sum[j];
    __syncthreads();
    const int64_t c = first + threadIdx.x;
    if (c >= d) return;
    float total = 0.0f;
    for (int w = 0; w < kGatherWarps; ++w) total += sums[w][threadIdx.x];
    soft[blockIdx.y * d + c] = scale * total;
}

// --- with another embedding, whose rows ggml's kernels gather ---

// Concatenates the lists of the rows that gather; row t's begins at first[t]. first [n + 1].
__global__ void pack_lists(const int32_t* first, const int32_t* tokens, const float* weights,
                           int32_t* packed_tokens, float* packed_weights) {
    const int64_t list = static_cast<int64_t>(blockIdx.x) * kMaxGathered;
    const int32_t begin = first[blockIdx.x], n = first[blockIdx.x + 1] - begin;
    for (int32_t i = threadIdx.x; i < n; i += blockDim.x) {
        packed_tokens[begin + i] = tokens[list + i];
        packed_weights[begin + i] = weights[list + i];
    }
}

// soft[:, t] += scale * weighted sum of t's rows among the gathered rows [from, to).
__global__ void add_gathered(float* soft, const float* rows, const float* weights, const int32_t* first,
                             int32_t from, int32_t to, int64_t d, float scale) {
    const int64_t c = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
    const int32_t begin = max(first[blockIdx.x], from), end = min(first[blockIdx.x + 1], to);
    if (c >= d || begin >= end) return;
    float sum = 0.0f;
    for (int32_t i = begin; i < end; ++i) sum += weights[i] * rows[(i - from) * d + c];
    soft[blockIdx.x * d + c] += scale * sum;
}

// --- of flatter positions, by a matmul with the whole embedding ---

constexpr int kProbabilities = 2048, kProbabilityThreads = 256;  // of a block

// Reads or writes four numbers that are aligned together.
__device__ __forceinline__ void load(const float* x, float (&four)[4]) {
    const float4 read = *reinterpret_cast<const float4*>(x);
    four[0] = read.x, four[1] = read.y, four[2] = read.z, four[3] = read.w;
}
__device__ __forceinline__ void load(const float* x, float (&one)[1]) { one[0] = *x; }
__device__ __forceinline__ void store(__half* out, const float (&x)[4]) {
    *reinterpret_cast<uint2*>(out) = make_uint2(cuda::half2_of(x[0], x[1]), cuda::half2_of(x[2], x[3]));
}
__device__ __forceinline__ void store(__half* out, const float (&x)[1]) { *out = __float2half(x[0]); }
__device__ __forceinline__ void store(cuda::Bfloat16* out, const float (&x)[4]) {
    *reinterpret_cast<uint2*>(out) =
        make_uint2(cuda::bfloat16x2_of(x[0], x[1]), cuda::bfloat16x2_of(x[2], x[3]));
}
__device__ __forceinline__ void store(cuda::Bfloat16* out, const float (&x)[1]) {
    *out = cuda::bfloat16_of(x[0]);
}

// Probabilities of tokens [from, from + n_rows) for the dense positions, times kHalfScale: out [n_rows,
// n_dense]. Grid: kProbabilities rows, positions. kTogether, of which n_vocab, from and n_rows are multiples:
// 4 or 1.
template <typename T, int kTogether>
__global__ void __launch_bounds__(kProbabilityThreads)
    dense_probabilities(T* out, const float* logits, const row::Distribution* distributions,
                        const int32_t* positions, int64_t n_vocab, int64_t from, int64_t n_rows) {
    constexpr int n_groups = kProbabilities / kProbabilityThreads / kTogether;  // of a thread
    const int64_t t = positions[blockIdx.y];
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kProbabilities + threadIdx.x * kTogether;
    const row::Distribution d = distributions[t];
    const float* x = logits + t * n_vocab + from;
    float values[n_groups][kTogether] = {};
#pragma unroll
    for (int j = 0; j < n_groups; ++j) {
        const int64_t r = first + j * kProbabilityThreads * kTogether;
        if (r < n_rows) load(x + r, values[j]);
    }
#pragma unroll
    for (int j = 0; j < n_groups; ++j) {
        const int64_t r = first + j * kProbabilityThreads * kTogether;
#pragma unroll
        for (float& value : values[j]) value = row::probability(d, value) * kHalfScale;
        if (r < n_rows) store(out + blockIdx.y * n_rows + r, values[j]);
    }
}

__global__ void scatter_rows(float* soft, const float* rows, const int32_t* positions, int64_t d,
                             float scale) {
    const int64_t c = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
    if (c < d) soft[positions[blockIdx.x] * d + c] = scale * rows[blockIdx.x * d + c];
}

}  // namespace

}  // namespace pydiffusion
