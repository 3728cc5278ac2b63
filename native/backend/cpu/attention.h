// Attention as one graph node of our own: ggml's on the CPU turns keys over again for every head and every 64
// queries, takes a slow path below 64 queries, and adds float16 values up in float16 there.
#pragma once

#include <cstdint>

#include "backend/cpu/amx/tile_gemm.h"
#include "ggml.h"

namespace pydiffusion {

// Which rows a token may see: those of its own position and of the window - 1 positions before it.
struct Causal {
    int32_t row_position;    // of row 0 of the keys
    int32_t token_position;  // of token 0 of the queries
    int32_t window;
};

// Keys and values are gone through in tiles of this many rows, whose weights are added up tile by tile. So
// that a sum depends on positions only, not on how a prompt was cut, causal attention is given rows that
// begin at a multiple of this (KvCache::causal_range).
constexpr int64_t kAttentionTile = 64;

// softmax(q . k) v, without a scale, of q [head_dim, n_head, n_tokens] over k and v [head_dim, n_rows,
// n_head_kv], each key head serving n_head / n_head_kv heads in turn -> F32 [head_dim * n_head, n_tokens].
// k and v may have any type that ggml turns into floats; sums are float32. `causal` null: every token sees
// every row. It must live as long as the graph.
ggml_tensor* attend(ggml_context* ctx, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, const Causal* causal,
                    gemm::Kernel kernel);

}  // namespace pydiffusion
