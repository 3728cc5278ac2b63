// Row counts of the KV cache per layer, for allocating the cache and for the device plan.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/cpu/attention.h"
#include "model/hparams.h"

namespace pydiffusion {

// Rows of a layer's buffers. Sliding layers have slack of another window (at least the tile that
// KvCache::causal_range() may begin with): rows then move once per window of tokens instead of every batch,
// and a session can be truncated a little without encoding again. An image longer than a batch has to fit
// after the window; at the released window, 1024, it does so in that slack.
inline int64_t kv_rows(const Hparams& hparams, bool sliding, int64_t n_ctx, int64_t max_batch,
                       int64_t image_tokens = 0) {
    if (!sliding) return n_ctx;
    const int64_t window = hparams.window;
    const int64_t for_batch = window + std::max(window, kAttentionTile) + max_batch;
    return std::min(n_ctx, std::max(for_batch, window + kAttentionTile + image_tokens));
}

// Most rows that n tokens can attend to, including their own; see KvCache::causal_range().
inline int64_t kv_visible_rows(const Hparams& hparams, bool sliding, int64_t n_ctx, int64_t n_tokens) {
    return sliding ? std::min(n_ctx, hparams.window + kAttentionTile - 2 + n_tokens) : n_ctx;
}

// Throws Error(argument) unless every head_dim is a multiple of the type's block size.
void require_fitting_heads(const Hparams& hparams, ggml_type type);

}  // namespace pydiffusion
