#include <climits>

#include "backend/cpu/fused_rows.h"
#include "backend/cuda/expert_matmul_kernels.cuh"
#include "backend/cuda/expert_operands.cuh"
#include "backend/cuda/own_kernels.cuh"
#include "backend/expert_nodes.h"
#include "backend/own_kernels.h"
#include "backend/repacked_weights.h"

namespace pydiffusion {

namespace {

using namespace cuda;

// Tiles measured fastest on an H200 at 256 tokens, 128 experts of which each uses 8 (benchmarks/h200.md).
template <typename Format>
using ExpertTile = Tile<Format, 4, Format::kAligned ? 2 : 1, 3, 2>;

// Fewer tokens are left to ggml, whose kernels for them read each weight once and unpack nothing to shared
// memory.
constexpr int64_t kMinTokens = 9;

template <typename Rows>
void pack(cudaStream_t stream, const Rows& rows, int64_t n_values, const ggml_tensor* node) {
    const Packed packed(node, n_values);
    const auto kernel =
        is_for_repacked(node) ? pack_rows<PackOrder::even_odd, Rows> : pack_rows<PackOrder::quads, Rows>;
    ggml_cuda_kernel_launch(
        kernel, {dim3(static_cast<unsigned>(packed.n_rows)), dim3(kPackThreads), size_t{0}, stream}, rows,
        static_cast<int32_t>(n_values), static_cast<int32_t>(packed.n_chunks), packed.rows, packed.scales);
}

// Distance of rows that all are in their order: of x [n, n_rows], or [n, n_used, n_tokens] with dense rows.
bool has_even_rows(const ggml_tensor* x) {
    return x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && x->ne[3] == 1 &&
           (x->ne[2] == 1 || x->ne[1] == 1 || x->nb[2] == x->ne[1] * x->nb[1]);
}
int64_t row_stride(const ggml_tensor* x) { return float_stride(x, x->ne[1] == 1 && x->ne[2] > 1 ? 2 : 1); }

void group(cudaStream_t stream, const ggml_tensor* node) {
    const ggml_tensor* ids = node->src[0];
    const int64_t n_experts = n_expert_of(node);
    const Grouped grouped(node, ggml_nelements(ids), n_experts);
    ggml_cuda_kernel_launch(group_slots, {dim3(1), dim3(kGroupThreads), size_t{0}, stream},
                            static_cast<const int32_t*>(ids->data),
                            static_cast<int64_t>(ids->nb[1] / sizeof(int32_t)), size(ids, 0), size(ids, 1),
                            static_cast<int32_t>(n_experts), static_cast<int32_t>(kTileSlots), grouped.slots,
                            grouped.tiles, grouped.n_tiles);
}

template <typename Format>
Launch launch_for(const ggml_tensor* weights, int64_t n_slots) {
    static_assert(ExpertTile<Format>::kSlots == kTileSlots);
    return launch_of<ExpertTile<Format>>(weights->ne[1], packed_chunks(weights->ne[0]), weights->ne[2],
                                         n_slots);
}

// Chunks may be read up to a chunk beyond a row, in 32 bits.
template <typename Format>
bool fits(const ggml_tensor* weights, const ggml_tensor* experts) {
    const int64_t n_slots = ggml_nelements(experts);
    return static_cast<int64_t>(weights->nb[2]) + Format::kPitch <= INT_MAX &&
           weights->ne[2] <= kMaxExperts &&
           n_slots * packed_chunks(weights->ne[0]) * kXChunkBytes <= INT_MAX &&
           launch_for<Format>(weights, n_slots).n_tiles <= USHRT_MAX;
}

template <typename Format>
void multiply(cudaStream_t stream, const ggml_tensor* node) {
    using T = ExpertTile<Format>;
    const ggml_tensor *weights = node->src[0], *experts = node->src[3];
    const int64_t n_slots = ggml_nelements(experts), n_rows = weights->ne[1];
    const Packed x(node->src[1], weights->ne[0]);
    const Grouped grouped(node->src[2], n_slots, weights->ne[2]);
    const Launch launch = launch_for<Format>(weights, n_slots);
    const MatmulArguments arguments = {static_cast<const unsigned char*>(weights->data),
                                       static_cast<int64_t>(ggml_nbytes(weights)),
                                       static_cast<int64_t>(weights->nb[2]),
                                       static_cast<int32_t>(weights->nb[1]),
                                       static_cast<int32_t>(n_rows),
                                       size(weights, 0),
                                       static_cast<int32_t>(x.n_chunks),
                                       static_cast<int32_t>(launch.n_row_tiles),
                                       x.rows,
                                       x.scales,
                                       static_cast<float*>(node->data),
                                       grouped.slots,
                                       grouped.tiles,
                                       grouped.n_tiles,
                                       static_cast<int32_t>(n_slots / x.n_rows)};
    const auto kernel = expert_matmul<Format, T>;
    CUDA_SET_SHARED_MEMORY_LIMIT(kernel, T::kSharedBytes);
    const dim3 grid(static_cast<unsigned>(launch.n_row_blocks), static_cast<unsigned>(launch.n_tiles));
    ggml_cuda_kernel_launch(kernel, {grid, dim3(T::kThreads), static_cast<size_t>(T::kSharedBytes), stream},
                            arguments);
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

bool can_run_expert_matmuls(int device, int n_blocks) {
    return can_run<Q4K>(device, n_blocks) && can_run<Q6K>(device, n_blocks) && can_run<Q80>(device, n_blocks);
}

bool can_multiply_experts(const ggml_tensor* weights, const ggml_tensor* experts) {
    if (is_repacked(weights)) return fits_repacked(weights, ggml_nelements(experts));
    if (experts->ne[1] < kMinTokens || !ggml_is_contiguous(weights) || weights->ne[3] != 1) return false;
    switch (weights->type) {
        case GGML_TYPE_Q4_K:
            return fits<Q4K>(weights, experts);
        case GGML_TYPE_Q6_K:
            return fits<Q6K>(weights, experts);
        case GGML_TYPE_Q8_0:
            return fits<Q80>(weights, experts);
        default:
            return false;
    }
}

bool compute_expert_node(ggml_backend_cuda_context* ctx, const ggml_tensor* node) {
    const ggml_tensor* const* src = node->src;
    const ExpertNode kind = expert_node_of(node);
    const bool packs =
        kind == ExpertNode::pack || kind == ExpertNode::pack_normed || kind == ExpertNode::pack_gated;
    if (packs && !has_even_rows(src[0])) return false;
    if (kind == ExpertNode::pack_gated && !has_even_rows(src[1])) return false;
    if (!ctx) return kind != ExpertNode::none;
    const cudaStream_t stream = ctx->stream();
    switch (kind) {
        case ExpertNode::pack:
            pack(stream, PlainRows{floats(src[0]), row_stride(src[0])}, src[0]->ne[0], node);
            return true;
        case ExpertNode::pack_normed:
            pack(stream, NormedRows{floats(src[0]), row_stride(src[0]), floats(src[1]), eps_of(node)},
                 src[0]->ne[0], node);
            return true;
        case ExpertNode::pack_gated:
            pack(stream, GatedRows{floats(src[0]), floats(src[1]), row_stride(src[0]), row_stride(src[1])},
                 src[0]->ne[0], node);
            return true;
        case ExpertNode::group:
            group(stream, node);
            return true;
        case ExpertNode::multiply:
            GGML_ASSERT(is_repacked(src[0]) == is_for_repacked(src[1]));
            if (is_repacked(src[0])) {
                multiply_repacked(stream, node);
                return true;
            }
            switch (src[0]->type) {
                case GGML_TYPE_Q4_K:
                    multiply<Q4K>(stream, node);
                    return true;
                case GGML_TYPE_Q6_K:
                    multiply<Q6K>(stream, node);
                    return true;
                default:
                    multiply<Q80>(stream, node);
                    return true;
            }
        case ExpertNode::multiply_gated:
            multiply_repacked(stream, node);
            return true;
        case ExpertNode::none:
            break;
    }
    return false;
}

}  // namespace pydiffusion
