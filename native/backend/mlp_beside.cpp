#include "backend/mlp_beside.h"

#include "backend/cpu/custom_node.h"
#include "backend/cpu/node_parts.h"

namespace pydiffusion {

namespace {

// Identifies the node; devices never call it.
void only_on_devices(ggml_tensor*, int, int, void*) {
    GGML_ABORT("mlp_beside: no implementation for the CPU");
}

}  // namespace

MlpScratch mlp_scratch(int64_t d, int64_t n_ff, int64_t n_tokens) {
    MlpScratch at;
    at.normed = after_part(0, d * n_tokens * static_cast<int64_t>(sizeof(float)));
    at.both = after_part(at.normed, d * n_tokens * static_cast<int64_t>(sizeof(ggml_bf16_t)));
    at.activation = after_part(at.both, 2 * n_ff * n_tokens * static_cast<int64_t>(sizeof(float)));
    at.end = after_part(at.activation, n_ff * n_tokens * static_cast<int64_t>(sizeof(ggml_bf16_t)));
    return at;
}

ggml_tensor* mlp_beside(ggml_context* ctx, ggml_tensor* x, ggml_tensor* norm, ggml_tensor* gate_up,
                        ggml_tensor* down, const float* eps) {
    const int64_t d = x->ne[0], n = x->ne[1], row = d * static_cast<int64_t>(sizeof(float));
    const int64_t n_rows = rows_for(mlp_scratch(d, down->ne[0], n).end, row);
    ggml_tensor* sources[] = {x, gate_up, down, norm};
    ggml_tensor* node = ggml_custom_4d(ctx, GGML_TYPE_F32, d, n_rows, 1, 1, sources, norm ? 4 : 3,
                                       only_on_devices, 1, nullptr);
    node->extra = const_cast<float*>(eps);
    ggml_set_name(node, "mlp_beside");
    return ggml_view_2d(ctx, node, d, n, node->nb[1], 0);
}

bool is_mlp_beside(const ggml_tensor* node) { return is_custom_node_of(node, only_on_devices); }

}  // namespace pydiffusion
