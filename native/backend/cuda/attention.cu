#include <climits>

#include "backend/attention_node.h"
#include "backend/cuda/attention_kernels.cuh"
#include "backend/cuda/own_kernels.cuh"

namespace pydiffusion {

namespace {

using namespace cuda;

// Tiles measured fastest on an H200 at 256 tokens (benchmarks/h200.md).
using Tile256 = AttentionTile<256, 80, 2>;
using Tile512 = AttentionTile<512, 64, 1>;

using EncodeMap = decltype(&cuTensorMapEncodeTiled);

// A function of the driver, which we don't link.
EncodeMap map_encoder() {
    static const EncodeMap encoder = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        const bool done = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                           cudaEnableDefault, &found) == cudaSuccess;
        (void)cudaGetLastError();
        return done && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeMap>(function) : nullptr;
    }();
    return encoder;
}

// rows: [head_dim, n_rows, n_head_kv] of a cache
template <typename T>
TensorMap map_of(const ggml_tensor* rows) {
    const cuuint64_t sizes[] = {64, static_cast<cuuint64_t>(rows->ne[1]),
                                static_cast<cuuint64_t>(rows->ne[0] / 64 * rows->ne[2])};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(rows->nb[1]), 64 * sizeof(ggml_fp16_t)};
    const cuuint32_t box[] = {64, T::kKeys, T::kChunks}, steps[] = {1, 1, 1};
    TensorMap map;
    const CUresult result =
        map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, rows->data, sizes, strides, box, steps,
                      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    GGML_ASSERT(result == CUDA_SUCCESS);
    return map;
}

template <typename T>
void attend(cudaStream_t stream, const ggml_tensor* node) {
    const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2];
    const AttentionParts parts = attention_parts(q, k, node->type);
    const AttentionRange range = attention_range_of(node);
    char* data = static_cast<char*>(node->data);
    const auto q_size = static_cast<int64_t>(ggml_type_size(q->type));
    AttentionArguments a;
    a.k = map_of<T>(k);
    a.v = map_of<T>(v);
    a.q = q->data;
    a.q_head = static_cast<int64_t>(q->nb[1]) / q_size;
    a.q_token = static_cast<int64_t>(q->nb[2]) / q_size;
    a.q_is_half = q->type == GGML_TYPE_F16;
    a.n_tokens = static_cast<int32_t>(q->ne[2]);
    a.group = static_cast<int32_t>(q->ne[1] / k->ne[2]);
    a.n_rows = static_cast<int32_t>(k->ne[1]);
    a.own_row = range.own_row;
    a.window = range.window;
    a.n_splits = static_cast<int32_t>(parts.n_splits);
    a.out = data;
    a.out_token = node->ne[0];
    a.type = node->type == GGML_TYPE_BF16 ? FloatType::bf16 : FloatType::f32;
    a.partial = reinterpret_cast<uint4*>(data + parts.partial);
    a.sums = reinterpret_cast<float2*>(data + parts.sums);
    const auto n_tiles = static_cast<unsigned>(parts.n_tiles), n_kv = static_cast<unsigned>(k->ne[2]);
    const auto kernel = attend_rows<T>;
    CUDA_SET_SHARED_MEMORY_LIMIT(kernel, T::kSharedBytes);
    ggml_cuda_kernel_launch(kernel,
                            {dim3(n_tiles, static_cast<unsigned>(parts.n_splits), n_kv),
                             dim3(kAttentionThreads), static_cast<size_t>(T::kSharedBytes), stream},
                            a);
    if (parts.n_splits == 1) return;
    const auto merge = parts.n_splits == 2 ? merge_attention<T, 2> : merge_attention<T, 4>;
    ggml_cuda_kernel_launch(merge,
                            {dim3(n_tiles * kMergeBlocks, n_kv), dim3(kMergeThreads), size_t{0}, stream}, a);
}

}  // namespace

bool can_run_attention(int device) {
    const int n_bytes = std::max(Tile256::kSharedBytes, Tile512::kSharedBytes);
    return can_run_repacked_matmuls(device) &&  // it has Hopper's code
           ggml_cuda_info().devices[device].smpbo >= static_cast<size_t>(n_bytes) && map_encoder();
}

bool compute_attention(ggml_backend_cuda_context* ctx, const ggml_tensor* node) {
    if (!can_attend_by_kernel(node->src[0], node->src[1], node->src[2])) return false;
    if (!ctx) return true;
    if (node->src[0]->ne[0] == Tile512::kDims) {
        attend<Tile512>(ctx->stream(), node);
    } else {
        attend<Tile256>(ctx->stream(), node);
    }
    return true;
}

}  // namespace pydiffusion
