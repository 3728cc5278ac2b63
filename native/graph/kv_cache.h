// Keys and values of one session. Full layers grow with the context; sliding layers keep the window and
// little more. Rows are linear in both, so what a batch may see is one contiguous range, the batch itself at
// its end.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/attention.h"
#include "ggml-cpp.h"
#include "model/device_plan.h"
#include "model/hparams.h"

namespace pydiffusion {

// Rows of one layer's buffers that a batch of n tokens behind the cache concerns.
struct KvRange {
    ggml_tensor* k;  // [head_dim * n_head_kv, n_rows]
    ggml_tensor* v;
    int64_t write;           // the batch's own rows begin here
    int64_t first;           // the first row that its first token may see
    int32_t first_position;  // of that row

    int64_t n_visible(int64_t n_tokens) const { return write + n_tokens - first; }
};

class KvCache {
  public:
    // `max_batch` rows can be written behind the cache at a time (a chunk of the prompt, or the canvas).
    KvCache(const Hparams& hparams, const Backend& backend, const DevicePlan& device_plan, ggml_type type,
            int32_t n_ctx, int32_t max_batch);

    int32_t n_past() const { return n_past_; }
    // Changes whenever rows come, go or move, and is never the same in two caches: what was built for a
    // version fits as long as it stands.
    uint64_t version() const { return version_; }
    uint64_t n_bytes() const;

    // Makes room behind the cache for n tokens; after it, range() and advance() hold for up to n tokens, and
    // the rows behind these, with which a device's masks are filled up, are zeros.
    void prepare(int32_t n_tokens);
    KvRange range(int32_t i_layer) const;
    // For tokens that see a window of their own each: begins with a tile of attention, and so with rows in
    // front of the first token's window, which no token sees.
    KvRange causal_range(int32_t i_layer) const;

    // The n tokens written behind the cache belong to it now.
    void advance(int32_t n_tokens) {
        n_past_ += n_tokens;
        version_ = next_version();
    }

    // Remembers this point, so that the session can go back to it (and a little before) however far it goes
    // on: before rows of the window in front of it are given up, the sliding layers' are copied aside.
    void mark() { mark_ = n_past_; }

    // Forgets all but the first n tokens. False, and nothing done, where the sliding layers no longer hold
    // the window before position n: then the caller has to encode again.
    bool truncate(int32_t n);
    void clear();

    // Rows that a copy of this cache needs of a layer: all of a full one, of a sliding one those from
    // first_kept() on; row_bytes() for each token. read_rows() copies them to `target`.
    int32_t first_kept() const { return tile_start(n_past_, window_); }
    // The first position of the tile of attention that holds the first row which token n sees.
    static int32_t tile_start(int32_t n, int32_t window) {
        constexpr auto tile = static_cast<int32_t>(kAttentionTile);
        return window_start(n, window) / tile * tile;
    }
    size_t row_bytes(int32_t i_layer) const { return layers_[i_layer].k->nb[1]; }
    void read_rows(int32_t i_layer, bool values, uint8_t* target) const;

    // The other way: takes n tokens' rows (k and v of each layer) in place of what it holds.
    void restore(int32_t n, const std::vector<std::pair<const uint8_t*, const uint8_t*>>& rows);

  private:
    struct Layer {
        ggml_tensor* k;
        ggml_tensor* v;
        bool sliding;
    };

    // Rows of the sliding layers that were in front of the mark, layer by layer, k before v.
    struct Snapshot {
        int32_t first = 0, end = 0;  // positions
        std::vector<uint8_t> rows;
    };

    void allocate(ggml_context* context, ggml_backend_buffer_type_t type, int32_t n_ctx);
    static uint64_t next_version();
    void drop_rows_before(int32_t position);
    void take_snapshot(int32_t position);
    bool go_back_to_snapshot(int32_t n);
    KvRange range_from(int32_t i_layer, int32_t position) const;
    static int32_t window_start(int32_t n, int32_t window) { return std::max(0, n - (window - 1)); }

    int32_t window_;
    int32_t sliding_rows_;
    int64_t n_padding_rows_;          // room behind the last row for those that fill a mask up
    std::atomic<int32_t> n_past_{0};  // others may ask while a thread computes
    uint64_t version_ = next_version();
    int32_t base_ = 0;   // position of row 0 of the sliding layers, where a tile begins
    int32_t mark_ = -1;  // position to which truncate() should find its way back
    Snapshot snapshot_;
    std::vector<ggml_context_ptr> contexts_;  // the processor's layers, then each device's
    std::vector<ggml_backend_buffer_ptr> buffers_;
    std::vector<Layer> layers_;
};

}  // namespace pydiffusion
