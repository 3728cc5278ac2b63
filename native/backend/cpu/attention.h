// Attention on the CPU as one custom graph node. ggml's flash attention on the CPU transposes K anew for
// every head and every 64 queries, and below 64 queries takes a slow path that accumulates float16 V in
// float16.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "backend/cpu/amx/tile_gemm.h"
#include "ggml.h"

namespace pydiffusion {

// Positions [begin, end) whose tokens see each other both ways: an image's.
struct ImageRange {
    int32_t begin, end;
};

// Causal sliding window: a token sees its own position and the window - 1 positions before it, and a token of
// an image all of that image. What it sees is one range, as its own position is part of both.
struct Causal {
    int32_t row_position;    // of row 0 of K
    int32_t token_position;  // of token 0 of Q
    int32_t window;
    std::vector<ImageRange> images{};  // in order; each of them wholly among the tokens of Q

    struct Rows {
        int32_t first, last;
    };
    // Rows of K that token t of Q sees.
    Rows visible(int32_t t) const {
        const int32_t position = token_position + t;
        Rows rows = {position - window + 1, position};
        const auto after = [](int32_t p, const ImageRange& image) { return p < image.end; };
        const auto image = std::upper_bound(images.begin(), images.end(), position, after);
        if (image != images.end() && image->begin <= position)
            rows = {std::min(rows.first, image->begin), image->end - 1};
        return {std::max(0, rows.first - row_position), rows.last - row_position};
    }
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
