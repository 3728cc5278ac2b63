// Attention on the CPU as one custom graph node. ggml's flash attention on the CPU transposes K anew for
// every head and every 64 queries, and below 64 queries takes a slow path that accumulates float16 V in
// float16.
#pragma once

#include <cstdint>

#include "backend/cpu/amx/tile_gemm.h"
#include "ggml.h"

namespace pydiffusion {

// Causal sliding window: a token sees its own position and the window - 1 positions before it.
struct Causal {
    int32_t row_position;    // of row 0 of K
    int32_t token_position;  // of token 0 of Q
    int32_t window;
};

// K and V are read in tiles of this many rows, and softmax sums are added tile by tile. The rows passed to
// causal attention begin at a multiple of this (KvCache::causal_range), so that sums depend on positions only
// and not on how a prompt was split into chunks.
constexpr int64_t kAttentionTile = 64;

// softmax(q . k) v, unscaled: q [head_dim, n_head, n_tokens], k and v [head_dim, n_rows, n_head_kv], with
// n_head / n_head_kv consecutive heads per KV head -> F32 [head_dim * n_head, n_tokens]. k and v may have any
// type that ggml converts to float; sums are float32. `causal` must live as long as the graph; null: every
// token sees every row.
ggml_tensor* attend(ggml_context* ctx, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, const Causal* causal,
                    gemm::Kernel kernel);
bool is_attention(const ggml_tensor* node);  // of attend()

}  // namespace pydiffusion
