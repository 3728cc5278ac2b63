#include "backend/attention_node.h"

#include <algorithm>
#include <cstring>

#include "backend/cpu/custom_node.h"
#include "backend/cpu/node_parts.h"
#include "ggml-backend.h"

namespace pydiffusion {

namespace {

// Identifies the node; devices never call it.
void only_on_devices(ggml_tensor*, int, int, void*) {
    GGML_ABORT("attend_by_kernel: no implementation for the CPU");
}

// An H100's and an H200's multiprocessors, each of which has room for one block.
constexpr int64_t kBlocks = 132;
// Fewer keys than this are not worth a block.
constexpr int64_t kKeysOfSplit = 128;
constexpr int64_t kMaxSplits = 16;

bool is_on_host(const ggml_tensor* t) {
    const ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return buffer && ggml_backend_buffer_is_host(buffer);
}

bool has_cache_rows(const ggml_tensor* t) {
    return !is_on_host(t) && t->type == GGML_TYPE_F16 && t->nb[0] == sizeof(ggml_fp16_t) &&
           t->nb[1] % 16 == 0 && t->nb[2] == t->ne[0] * sizeof(ggml_fp16_t) && t->ne[3] == 1;
}

}  // namespace

bool can_attend_by_kernel(const ggml_tensor* q, const ggml_tensor* k, const ggml_tensor* v) {
    const auto size = static_cast<size_t>(q->type == GGML_TYPE_F32 ? 4 : 2);
    return (q->type == GGML_TYPE_F32 || q->type == GGML_TYPE_F16) && q->nb[0] == size && q->nb[1] % 16 == 0 &&
           q->nb[2] % 16 == 0 && q->ne[3] == 1 && (q->ne[0] == 256 || q->ne[0] == 512) && has_cache_rows(k) &&
           has_cache_rows(v) && k->ne[0] == q->ne[0] && v->ne[0] == q->ne[0] && k->nb[1] == v->nb[1] &&
           k->ne[1] == v->ne[1] && k->ne[2] == v->ne[2] && q->ne[1] % k->ne[2] == 0 &&
           q->ne[1] * q->ne[2] <= INT32_MAX && k->ne[1] <= INT32_MAX / 2 && k->ne[2] <= 65535;
}

AttentionParts attention_parts(const ggml_tensor* q, const ggml_tensor* k, ggml_type type) {
    const int64_t head_dim = q->ne[0], n_kv = k->ne[2], n_tile_rows = attention_tile_rows(head_dim);
    AttentionParts p;
    p.n_tiles = (q->ne[1] / n_kv * q->ne[2] + n_tile_rows - 1) / n_tile_rows;
    const int64_t n_useful = (k->ne[1] + kKeysOfSplit - 1) / kKeysOfSplit;
    p.n_splits = std::clamp<int64_t>(std::min(kBlocks / (p.n_tiles * n_kv), n_useful), 1, kMaxSplits);
    const int64_t n_rows = p.n_splits > 1 ? p.n_splits * n_kv * p.n_tiles * n_tile_rows : 0;
    p.partial = after_part(0, ggml_nelements(q) * static_cast<int64_t>(ggml_type_size(type)));
    p.sums = after_part(p.partial, n_rows * head_dim * static_cast<int64_t>(sizeof(ggml_fp16_t)));
    p.end = after_part(p.sums, n_rows * (head_dim / 256) * static_cast<int64_t>(2 * sizeof(float)));
    return p;
}

ggml_tensor* attend_by_kernel(ggml_context* ctx, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                              const Causal* causal, ggml_type type) {
    AttentionRange range = {0, 0};
    if (causal) range = {causal->token_position - causal->row_position, causal->window};
    void* userdata;  // part of the node, by which equal nodes are recognized
    static_assert(sizeof range == sizeof userdata);
    std::memcpy(&userdata, &range, sizeof range);
    const int64_t width = q->ne[0] * q->ne[1], row = width * static_cast<int64_t>(ggml_type_size(type));
    const AttentionParts parts = attention_parts(q, k, type);
    const int64_t n_rows = parts.n_splits > 1 ? rows_for(parts.end, row) : q->ne[2];
    ggml_tensor* sources[] = {q, k, v};
    ggml_tensor* node =
        ggml_custom_4d(ctx, type, width, n_rows, 1, 1, sources, 3, only_on_devices, 1, userdata);
    ggml_set_name(node, "attend_by_kernel");
    return ggml_view_2d(ctx, node, width, q->ne[2], node->nb[1], 0);
}

bool is_attend_by_kernel(const ggml_tensor* node) { return is_custom_node_of(node, only_on_devices); }

AttentionRange attention_range_of(const ggml_tensor* node) {
    const void* userdata = custom_parameters(node).userdata;
    AttentionRange range;
    std::memcpy(&range, &userdata, sizeof range);
    return range;
}

}  // namespace pydiffusion
