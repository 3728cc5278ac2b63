#include <climits>

#include "backend/attention_node.h"
#include "backend/cpu/fused_rows.h"
#include "backend/cpu/top_k.h"
#include "backend/cuda/attention_end.cuh"
#include "backend/cuda/expert_rows.cuh"
#include "backend/cuda/layer_kernels.cuh"
#include "backend/cuda/own_kernels.cuh"
#include "backend/expert_nodes.h"
#include "backend/mlp_beside.h"

namespace pydiffusion {

namespace {

using namespace cuda;

static_assert(kMaxDeviceExperts == kMaxScores && kMaxDeviceExpertsUsed == kMaxUsed);
static_assert(kMaxAttentionEnd <= kMaxEndedRow && kMaxAttentionEnd % kChunk == 0);

bool has_float_rows(const ggml_tensor* t) {
    return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->ne[3] == 1 && t->ne[0] <= INT_MAX &&
           ggml_nrows(t) <= INT_MAX;
}

bool has_rows(const ggml_tensor* t) {
    return (t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16) &&
           t->nb[0] == ggml_type_size(t->type);
}

const float* floats(const ggml_tensor* t) { return t ? static_cast<const float*>(t->data) : nullptr; }

// Distance of neighbours in a dimension, in elements.
int64_t stride(const ggml_tensor* t, int dimension) { return t->nb[dimension] / ggml_type_size(t->type); }

InputRows input(const ggml_tensor* t) { return {floats(t), stride(t, 1), stride(t, 2)}; }

FloatType float_type(ggml_type type) {
    if (type == GGML_TYPE_F32) return FloatType::f32;
    return type == GGML_TYPE_F16 ? FloatType::f16 : FloatType::bf16;
}

OutputRows output(const ggml_tensor* t) { return {t->data, stride(t, 1), stride(t, 2), float_type(t->type)}; }

char* part(const ggml_tensor* node, int64_t begin) { return static_cast<char*>(node->data) + begin; }

int32_t size(const ggml_tensor* t, int dimension) { return static_cast<int32_t>(t->ne[dimension]); }

int32_t n_rows(const ggml_tensor* t) { return static_cast<int32_t>(ggml_nrows(t)); }

struct Launch {
    cudaStream_t stream;
    bool overlaps = true;  // may begin before the kernel before it has finished

    template <typename Kernel, typename Arguments>
    void operator()(Kernel kernel, unsigned n_blocks, unsigned n_threads, const Arguments& arguments,
                    int n_shared_bytes = 0) const {
        if (overlaps) {
            const auto shared = static_cast<size_t>(n_shared_bytes);
            ggml_cuda_kernel_launch(kernel, {dim3(n_blocks), dim3(n_threads), shared, stream}, arguments);
        } else {
            kernel<<<n_blocks, n_threads, 0, stream>>>(arguments);
            CUDA_CHECK(cudaGetLastError());
        }
    }
};

// Norms and rotations of x's rows; weight and angles may be null.
bool norm(const Launch* launch, const ggml_tensor* x, const ggml_tensor* weight, const ggml_tensor* angles,
          float eps, const ggml_tensor* out) {
    if (!has_float_rows(x) || !has_rows(out) || (angles && x->ne[0] % 2)) return false;
    if (!launch) return true;
    if (angles) {
        launch_rotate_normed_rows({{{input(x), output(out), floats(weight), size(x, 1), true}},
                                   1,
                                   floats(angles),
                                   stride(angles, 1),
                                   size(x, 0),
                                   size(x, 2),
                                   eps},
                                  *launch);
    } else {
        launch_norm_rows({input(x), output(out), floats(weight), size(x, 0), size(x, 1), n_rows(x), eps},
                         *launch);
    }
    return true;
}

// Sources as rotate_and_store() has them.
bool rotate_and_store(const Launch* launch, const ggml_tensor* node) {
    const ggml_tensor* const* src = node->src;
    const ggml_tensor *q = src[0], *angles = src[2], *k = src[3], *v = src[5];
    if (!has_float_rows(q) || !has_float_rows(k) || !has_float_rows(v) || !has_rows(node) ||
        !has_rows(src[6]) || !has_rows(src[7]) || q->ne[0] % 2)
        return false;
    if (!launch) return true;
    launch_rotate_normed_rows({{{input(q), output(node), floats(src[1]), size(q, 1), true},
                                {input(k), output(src[6]), floats(src[4]), size(k, 1), true},
                                {input(v), output(src[7]), nullptr, size(v, 1), false}},
                               3,
                               floats(angles),
                               stride(angles, 1),
                               size(q, 0),
                               size(q, 2),
                               eps_of(node)},
                              *launch);
    return true;
}

bool add_normed(const Launch* launch, const ggml_tensor* node) {
    const ggml_tensor *x = node->src[0], *branch = node->src[1];
    if (!has_float_rows(x) || !has_float_rows(branch) || !has_float_rows(node)) return false;
    if (!launch) return true;
    launch_add_normed_rows(
        {floats(x), floats(branch), static_cast<float*>(node->data), stride(x, 1), stride(branch, 1),
         stride(node, 1), floats(node->src[2]), size(x, 0), size(x, 1), eps_of(node)},
        *launch);
    return true;
}

// Sources as end_attention() has them.
bool end_attention(const Launch* launch, const ggml_tensor* node) {
    const ggml_tensor* const* src = node->src;
    const ggml_tensor *x = src[0], *branch = src[1];
    if (!has_float_rows(x) || !has_float_rows(branch)) return false;
    const AttentionEndParts parts = parts_of_attention_end(node);
    const int32_t d = size(x, 0), n = size(x, 1);
    const auto n_chunks = static_cast<int32_t>(packed_chunks(d));
    const bool packs = src[5] != nullptr;
    char* packed = packs ? part(node, parts.packed) : nullptr;
    const AttentionEndArguments arguments = {
        {floats(x), floats(branch), static_cast<float*>(node->data), stride(x, 1), stride(branch, 1), d,
         floats(src[2]), d, n, eps_of(node)},
        floats(src[3]),
        floats(src[4]),
        floats(src[5]),
        {part(node, parts.dense), d, 0, float_type(parts.dense_type)},
        {part(node, parts.router), d, 0, FloatType::f32},
        reinterpret_cast<unsigned char*>(packed),
        packs ? reinterpret_cast<float*>(packed + int64_t{n} * n_chunks * kXChunkBytes) : nullptr,
        n_chunks};
    if (launch) {
        GGML_ASSERT(can_end_attention(arguments));
        const PackOrder order = parts.for_repacked ? PackOrder::even_odd : PackOrder::quads;
        launch_end_attention_rows(arguments, order, *launch);
    }
    return true;
}

bool route(const Launch* launch, const ggml_tensor* node) {
    const ggml_tensor *weights = node->src[0], *x = node->src[1];
    if (!has_float_rows(x) || !has_float_rows(weights)) return false;
    if (!launch) return true;
    const RoutedParts parts = parts_of_route(node);
    const int32_t n_experts = size(weights, 1);
    const auto n_used = static_cast<int32_t>(parts.k);
    const RouterArguments arguments = {floats(x),
                                       floats(weights),
                                       stride(x, 1),
                                       stride(weights, 1),
                                       reinterpret_cast<float*>(part(node, parts.scratch)),
                                       static_cast<float*>(node->data),
                                       reinterpret_cast<int32_t*>(part(node, parts.chosen)),
                                       n_experts,
                                       n_used,
                                       size(x, 0),
                                       n_experts,
                                       n_used,
                                       size(x, 1)};
    GGML_ASSERT(can_route(arguments));
    const int32_t n_shared_bytes =
        router_shared_bytes(ggml_cuda_info().devices[ggml_cuda_get_device()].smpbo);
    CUDA_SET_SHARED_MEMORY_LIMIT(router_partials, n_shared_bytes);
    launch_router(arguments, n_shared_bytes, *launch);
    return true;
}

bool gated_gelu(const Launch* launch, const ggml_tensor* node) {
    const ggml_tensor *gate = node->src[0], *up = node->src[1];
    if (!has_float_rows(gate) || !has_float_rows(up) || !has_rows(node) || ggml_nelements(node) > INT_MAX)
        return false;
    if (launch) {
        launch_gated_gelu_rows(
            {input(gate), input(up), output(node), size(node, 0), size(node, 1), n_rows(node)}, *launch);
    }
    return true;
}

bool top_k(const Launch* launch, const ggml_tensor* node) {
    const ggml_tensor* scores = node->src[0];
    if (!has_float_rows(scores) || scores->ne[0] > kMaxScores || node->ne[0] > scores->ne[0]) return false;
    if (launch) {
        launch_top_k_rows({floats(scores), static_cast<int32_t*>(node->data), stride(scores, 1),
                           stride(node, 1), size(scores, 0), size(node, 0), size(node, 1)},
                          *launch);
    }
    return true;
}

// On the side stream, beside what follows; join_branches waits for it.
bool mlp_beside(ggml_backend_cuda_context* ctx, const ggml_tensor* node) {
    const ggml_tensor *x = node->src[0], *gate_up = node->src[1], *down = node->src[2],
                      *norm_weight = node->src[3];
    if ((norm_weight ? !has_float_rows(x) : x->type != GGML_TYPE_BF16) || gate_up->type != GGML_TYPE_BF16 ||
        down->type != GGML_TYPE_BF16)
        return false;
    if (!ctx) return true;
    SideStream& side = *side_stream_of(ctx);
    side.begin(ctx->stream());
    const Launch launch = {side.stream(), false};
    const int32_t d = size(x, 0), n = size(x, 1), n_ff = size(down, 0);
    const MlpScratch at = mlp_scratch(d, n_ff, n);
    char* data = static_cast<char*>(node->data);
    const auto multiply = [&](const ggml_tensor* weight, const void* activations, void* result) {
        const int n_inner = size(weight, 0), n_rows = size(weight, 1);
        const float one = 1.0f, zero = 0.0f;
        CUBLAS_CHECK(cublasGemmEx(side.cublas(), CUBLAS_OP_T, CUBLAS_OP_N, n_rows, n, n_inner, &one,
                                  weight->data, CUDA_R_16BF, n_inner, activations, CUDA_R_16BF, n_inner,
                                  &zero, result, CUDA_R_32F, n_rows, CUBLAS_COMPUTE_32F,
                                  CUBLAS_GEMM_DEFAULT));
    };
    const OutputRows normed = {norm_weight ? data + at.normed : x->data, d, 0, FloatType::bf16},
                     activation = {data + at.activation, n_ff, 0, FloatType::bf16};
    if (norm_weight) launch_norm_rows({input(x), normed, floats(norm_weight), d, n, n, eps_of(node)}, launch);
    multiply(gate_up, normed.data, data + at.both);
    const float* both = reinterpret_cast<const float*>(data + at.both);
    launch_gated_gelu_rows({{both, 2 * n_ff, 0}, {both + n_ff, 2 * n_ff, 0}, activation, n_ff, n, n}, launch);
    multiply(down, activation.data, data);
    side.finish(ctx->stream());
    return true;
}

bool join_branches(const Launch* launch, const ggml_tensor* node) {
    const ggml_tensor *x = node->src[0], *dense = node->src[1], *experts = node->src[3],
                      *scores = node->src[4], *chosen = node->src[5];
    for (const ggml_tensor* rows : {x, dense, experts, scores}) {
        if (!has_float_rows(rows)) return false;
    }
    if (chosen->ne[0] > kMaxUsed || chosen->nb[0] != sizeof(int32_t)) return false;
    if (!launch) return true;
    const NextNorm next = next_norm_of(node);
    launch_join_rows({floats(x),
                      floats(dense),
                      floats(experts),
                      floats(scores),
                      static_cast<const int32_t*>(chosen->data),
                      static_cast<float*>(node->data),
                      stride(x, 1),
                      stride(dense, 1),
                      stride(experts, 1),
                      stride(experts, 2),
                      stride(scores, 1),
                      stride(chosen, 1),
                      stride(node, 1),
                      floats(node->src[6]),
                      floats(node->src[2]),
                      floats(node->src[7]),
                      floats(node->src[8]),
                      floats(layer_scale_of(node)),
                      size(node, 0),
                      size(scores, 0),
                      size(chosen, 0),
                      size(x, 1),
                      eps_of(node),
                      {next.weight ? part(node, next.begin) : nullptr, size(x, 0), 0, float_type(next.type)},
                      floats(next.weight)},
                     *launch);
    return true;
}

}  // namespace

bool compute_custom_node(ggml_backend_cuda_context* ctx, ggml_tensor* node) {
    Launch on_stream = {ctx ? ctx->stream() : nullptr};
    const Launch* launch = ctx ? &on_stream : nullptr;
    if (is_top_k(node)) return top_k(launch, node);
    if (is_route(node)) return route(launch, node);
    if (expert_node_of(node) != ExpertNode::none) return compute_expert_node(ctx, node);
    if (is_attend_by_kernel(node)) return compute_attention(ctx, node);
    if (is_mlp_beside(node)) return mlp_beside(ctx, node);
    const ggml_tensor* const* src = node->src;
    switch (fused_op_of(node)) {
        case FusedOp::rms_norm:
            return norm(launch, src[0], src[1], nullptr, eps_of(node), node);
        case FusedOp::rotate_normed:
            return norm(launch, src[0], src[1], src[2], eps_of(node), node);
        case FusedOp::store_normed:  // the first source is the view that it writes to
            return norm(launch, src[1], src[2], src[3], eps_of(node), node);
        case FusedOp::rotate_and_store:
            return rotate_and_store(launch, node);
        case FusedOp::add_normed:
            return add_normed(launch, node);
        case FusedOp::end_attention:
            return end_attention(launch, node);
        case FusedOp::gated_gelu:
            return gated_gelu(launch, node);
        case FusedOp::join_branches:
            // It waits for another stream too, not only for the kernel before it.
            on_stream.overlaps = false;
            if (ctx) side_stream_of(ctx)->join(ctx->stream());
            return join_branches(launch, node);
        case FusedOp::none:
            break;
    }
    return false;
}

}  // namespace pydiffusion
