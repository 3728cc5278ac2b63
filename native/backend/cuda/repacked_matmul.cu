#include <algorithm>
#include <climits>

#include "backend/cuda/expert_operands.cuh"
#include "backend/cuda/own_kernels.cuh"
#include "backend/cuda/repacked_matmul_kernels.cuh"
#include "backend/repacked_weights.h"

namespace pydiffusion {

namespace {

// Tiles measured fastest on an H200 at 256 tokens, 128 experts of which each uses 8 (benchmarks/h200.md).
template <bool is_gated = false>
using TileQ4K = RepackedTile<RepackedQ4K, 2, 3, 2, 4, is_gated>;
template <bool is_gated = false>
using TileQ6K = RepackedTile<RepackedQ6K, 1, 3, 2, 2, is_gated>;
template <bool is_gated = false>
using TileQ80 = RepackedTile<RepackedQ80, 1, 3, 2, 2, is_gated>;

// Operands as compute_expert_node() has them.
template <typename T, bool starts_early>
void launch(cudaStream_t stream, const ggml_tensor* node) {
    static_assert(T::kSlots == kTileSlots);
    const ggml_tensor *weights = node->src[0], *experts = node->src[3];
    const int64_t n_slots = ggml_nelements(experts), n_rows = weights->ne[1], n_experts = weights->ne[2];
    const Packed x(node->src[1], weights->ne[0]);
    const Grouped grouped(node->src[2], n_slots, n_experts);
    RepackedArguments arguments = {static_cast<const unsigned char*>(weights->data),
                                   static_cast<int64_t>(weights->nb[2]),
                                   static_cast<int32_t>(kRepackedRows * weights->nb[1]),
                                   static_cast<int32_t>(n_rows / kRepackedRows),
                                   size(weights, 0),
                                   static_cast<int32_t>(x.n_chunks),
                                   x.rows,
                                   x.scales,
                                   nullptr,
                                   grouped.slots,
                                   grouped.tiles,
                                   grouped.n_tiles,
                                   static_cast<int32_t>(n_slots / x.n_rows)};
    if constexpr (T::kGated) {
        const Packed result(node, n_rows / 2);
        arguments.gated = {result.rows, result.scales};
    } else {
        arguments.y = static_cast<float*>(node->data);
    }
    const RepackedLaunch sizes = repacked_launch_of<T>(n_rows, n_experts, n_slots);
    const auto kernel = repacked_matmul<T, starts_early>;
    CUDA_SET_SHARED_MEMORY_LIMIT(kernel, T::kSharedBytes);
    const dim3 grid(static_cast<unsigned>(sizes.n_row_blocks), static_cast<unsigned>(sizes.n_tiles));
    ggml_cuda_kernel_launch(kernel, {grid, dim3(T::kThreads), static_cast<size_t>(T::kSharedBytes), stream},
                            arguments);
}

template <bool is_gated, bool starts_early>
void multiply(cudaStream_t stream, const ggml_tensor* node) {
    switch (node->src[0]->type) {
        case GGML_TYPE_Q4_K:
            launch<TileQ4K<is_gated>, starts_early>(stream, node);
            break;
        case GGML_TYPE_Q6_K:
            launch<TileQ6K<is_gated>, starts_early>(stream, node);
            break;
        default:
            launch<TileQ80<is_gated>, starts_early>(stream, node);
            break;
    }
}

__global__ void has_hopper_code(int* result) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    *result = 1;
#else
    *result = 0;
#endif
}

}  // namespace

bool can_run_repacked_matmuls(int device) {
    const int n_bytes = std::max({TileQ4K<>::kSharedBytes, TileQ6K<>::kSharedBytes, TileQ80<>::kSharedBytes});
    if (ggml_cuda_info().devices[device].cc != GGML_CUDA_CC_HOPPER ||
        ggml_cuda_info().devices[device].smpbo < static_cast<size_t>(n_bytes))
        return false;
    int* on_device = nullptr;
    int result = 0;
    if (cudaMalloc(&on_device, sizeof(int)) == cudaSuccess) {
        has_hopper_code<<<1, 1>>>(on_device);
        if (cudaMemcpy(&result, on_device, sizeof(int), cudaMemcpyDeviceToHost) != cudaSuccess) result = 0;
        cudaFree(on_device);
    }
    (void)cudaGetLastError();
    return result == 1;
}

bool fits_repacked(const ggml_tensor* weights, int64_t n_slots) {
    // x is addressed in 32 bits; slot tiles are the grid's second dimension.
    return weights->ne[2] <= kMaxExperts && kRepackedRows * static_cast<int64_t>(weights->nb[1]) <= INT_MAX &&
           n_slots * packed_chunks(weights->ne[0]) * kXChunkBytes <= INT_MAX &&
           max_slot_tiles(weights->ne[2], n_slots) <= USHRT_MAX;
}

void multiply_repacked(cudaStream_t stream, const ggml_tensor* node) {
    if (expert_node_of(node) == ExpertNode::multiply_gated) {
        multiply<true, false>(stream, node);
    } else if (expert_node_of(node->src[1]) == ExpertNode::multiply_gated) {
        // That has waited for all kernels before it, which grouped the slots.
        multiply<false, true>(stream, node);
    } else {
        multiply<false, false>(stream, node);
    }
}

}  // namespace pydiffusion
