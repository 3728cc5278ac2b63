#include <climits>

#include "backend/cuda/expert_matmul_kernels.cuh"
#include "backend/cuda/own_kernels.cuh"

namespace pydiffusion {

namespace {

using namespace cuda;

// Tiles measured fastest on an H200 at 256 tokens, 128 experts of which each uses 8 (benchmarks/h200.md).
template <typename Format>
using ExpertTile = Tile<Format, 4, Format::kAligned ? 2 : 1, 3, 2>;

// Fewer tokens are left to ggml, whose kernels for them read each weight once and unpack nothing to shared
// memory.
constexpr int64_t kMinTokens = 9;

// Intermediate results of a matmul, in the backend's pool of temporary memory.
struct Scratch {
    Scratch(ggml_cuda_pool& pool, int64_t n_x, int64_t n_chunks, int64_t n_slots, int64_t n_tiles)
        : x(pool, n_x * n_chunks * kXChunkBytes),
          x_scale(pool, n_x),
          slots(pool, n_slots),
          tiles(pool, n_tiles),
          n_tiles(pool, 1) {}
    ggml_cuda_pool_alloc<unsigned char> x;
    ggml_cuda_pool_alloc<float> x_scale;
    ggml_cuda_pool_alloc<int32_t> slots;
    ggml_cuda_pool_alloc<SlotTile> tiles;
    ggml_cuda_pool_alloc<int32_t> n_tiles;
};

// Operands are those of ggml_mul_mat_id: weights [n_values, n_rows, n_experts], x [n_values, 1 or n_used,
// n_tokens], ids [n_used, n_tokens], dst [n_rows, n_used, n_tokens].
template <typename Format>
bool multiply_as(ggml_backend_cuda_context& ctx, const ggml_tensor* weights, const ggml_tensor* x,
                 const ggml_tensor* ids, ggml_tensor* dst) {
    using T = ExpertTile<Format>;
    const int64_t n_experts = weights->ne[2], n_rows = weights->ne[1], n_used = ids->ne[0],
                  n_tokens = ids->ne[1];
    const int64_t n_slots = n_used * n_tokens, n_x = x->ne[1] * x->ne[2];
    const int64_t n_chunks = (weights->ne[0] + kChunk - 1) / kChunk;
    const Launch launch = launch_of<T>(n_rows, n_chunks, n_experts, n_slots);
    // Chunks may be read up to a chunk beyond a row, in 32 bits.
    const int64_t last_byte = static_cast<int64_t>(weights->nb[2]) + Format::kPitch;
    if (ggml_cuda_info().devices[ctx.device].smpbo < T::kSharedBytes || n_experts > kMaxExperts ||
        last_byte > INT_MAX || n_x * n_chunks * kXChunkBytes > INT_MAX || launch.n_tiles > USHRT_MAX)
        return false;
    Scratch scratch(ctx.pool(), n_x, n_chunks, n_slots, launch.n_tiles);
    const cudaStream_t stream = ctx.stream();
    const int64_t x_stride = (x->ne[1] == 1 ? x->nb[2] : x->nb[1]) / sizeof(float);
    to_half<<<static_cast<unsigned>(n_x), kToHalfThreads, 0, stream>>>(
        static_cast<const float*>(x->data), x_stride, static_cast<int32_t>(x->ne[0]),
        static_cast<int32_t>(n_chunks), scratch.x.get(), scratch.x_scale.get());
    CUDA_CHECK(cudaGetLastError());
    group_slots<<<1, kGroupThreads, 0, stream>>>(
        static_cast<const int32_t*>(ids->data), ids->nb[1] / sizeof(int32_t), static_cast<int32_t>(n_used),
        static_cast<int32_t>(n_tokens), static_cast<int32_t>(n_experts), T::kSlots, scratch.slots.get(),
        scratch.tiles.get(), scratch.n_tiles.get());
    CUDA_CHECK(cudaGetLastError());
    const MatmulArguments arguments = {static_cast<const unsigned char*>(weights->data),
                                       static_cast<int64_t>(ggml_nbytes(weights)),
                                       static_cast<int64_t>(weights->nb[2]),
                                       static_cast<int32_t>(weights->nb[1]),
                                       static_cast<int32_t>(n_rows),
                                       static_cast<int32_t>(weights->ne[0]),
                                       static_cast<int32_t>(n_chunks),
                                       static_cast<int32_t>(launch.n_row_tiles),
                                       scratch.x.get(),
                                       scratch.x_scale.get(),
                                       static_cast<float*>(dst->data),
                                       scratch.slots.get(),
                                       scratch.tiles.get(),
                                       scratch.n_tiles.get(),
                                       static_cast<int32_t>(x->ne[1] == 1 ? n_used : 1)};
    const auto kernel = expert_matmul<Format, T>;
    CUDA_SET_SHARED_MEMORY_LIMIT(kernel, T::kSharedBytes);
    const dim3 grid(static_cast<unsigned>(launch.n_row_blocks), static_cast<unsigned>(launch.n_tiles));
    kernel<<<grid, T::kThreads, T::kSharedBytes, stream>>>(arguments);
    CUDA_CHECK(cudaGetLastError());
    return true;
}

// The layouts that the kernels read and write.
bool is_dense(const ggml_tensor* weights, const ggml_tensor* x, const ggml_tensor* ids,
              const ggml_tensor* dst) {
    return ggml_is_contiguous(weights) && weights->ne[3] == 1 &&
           reinterpret_cast<uintptr_t>(weights->data) % 16 == 0 && x->type == GGML_TYPE_F32 &&
           x->nb[0] == sizeof(float) && x->ne[3] == 1 && (x->ne[1] == 1 || x->ne[1] == ids->ne[0]) &&
           (x->ne[1] == 1 || x->nb[2] == x->ne[1] * x->nb[1]) && ids->nb[0] == sizeof(int32_t) &&
           dst->type == GGML_TYPE_F32 && ggml_is_contiguous(dst);
}

// Whether the current device has code of the kernels (not the empty code for GPUs before compute
// capability 8.0, which a driver may compile for any newer one) and room for so many blocks on a
// multiprocessor.
template <typename Format>
bool can_run(int device, int n_blocks) {
    using T = ExpertTile<Format>;
    const auto kernel = expert_matmul<Format, T>;
    const auto shared = static_cast<int>(ggml_cuda_info().devices[device].smpbo);
    cudaFuncAttributes attributes;
    int n_possible = 0;
    const bool is_known =
        shared >= T::kSharedBytes && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
        attributes.ptxVersion >= 80 &&
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes) ==
            cudaSuccess &&
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n_possible, kernel, T::kThreads, T::kSharedBytes) ==
            cudaSuccess;
    (void)cudaGetLastError();
    return is_known && n_possible >= n_blocks;
}

}  // namespace

bool can_multiply_experts(int device, int n_blocks) {
    return can_run<Q4K>(device, n_blocks) && can_run<Q6K>(device, n_blocks) && can_run<Q80>(device, n_blocks);
}

bool multiply_experts(ggml_backend_cuda_context& ctx, const ggml_tensor* weights, const ggml_tensor* x,
                      const ggml_tensor* ids, ggml_tensor* dst) {
    if (ids->ne[1] < kMinTokens) return false;
    if (!is_dense(weights, x, ids, dst)) return false;
    switch (weights->type) {
        case GGML_TYPE_Q4_K:
            return multiply_as<Q4K>(ctx, weights, x, ids, dst);
        case GGML_TYPE_Q6_K:
            return multiply_as<Q6K>(ctx, weights, x, ids, dst);
        case GGML_TYPE_Q8_0:
            return multiply_as<Q80>(ctx, weights, x, ids, dst);
        default:
            return false;
    }
}

}  // namespace pydiffusion
