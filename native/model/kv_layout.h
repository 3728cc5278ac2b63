// How many rows the KV cache has of each layer: what the cache allocates and a plan counts.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/cpu/attention.h"
#include "model/hparams.h"

namespace pydiffusion {

// Rows of a layer's buffers. Sliding layers have a window of slack behind the window (at least the tile of
// rows that KvCache::causal_range() may begin with), so that rows are moved once in a window's worth of
// tokens, not at every batch, and a session can be shortened a little without encoding again.
inline int64_t kv_rows(const Hparams& hparams, bool sliding, int64_t n_ctx, int64_t max_batch) {
    const int64_t window = hparams.window;
    return sliding ? std::min(n_ctx, window + std::max(window, kAttentionTile) + max_batch) : n_ctx;
}

// Rows that n tokens see at most, their own among them; see KvCache::causal_range().
inline int64_t kv_visible_rows(const Hparams& hparams, bool sliding, int64_t n_ctx, int64_t n_tokens) {
    return sliding ? std::min(n_ctx, hparams.window + kAttentionTile - 2 + n_tokens) : n_ctx;
}

// Throws Error(argument) where the model's heads aren't whole blocks of this type.
void require_fitting_heads(const Hparams& hparams, ggml_type type);

}  // namespace pydiffusion
