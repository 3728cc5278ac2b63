// KV cache of one session. Full layers hold the whole context, sliding layers the window plus some slack.
// Rows are in order of position (no ring buffer), so the visible rows of a batch are one contiguous range
// that ends with the batch itself.
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

// Rows of one layer's buffers that a batch appended to the cache writes and reads.
struct KvRange {
    ggml_tensor* k;  // [head_dim * n_head_kv, n_rows]
    ggml_tensor* v;
    int64_t write;           // first row of the batch itself
    int64_t first;           // first row visible to its first token
    int32_t first_position;  // position of that row

    int64_t n_visible(int64_t n_tokens) const { return write + n_tokens - first; }
};

class KvCache {
  public:
    // `max_batch`: most rows written after the cache at a time (a chunk of the prompt, or the canvas), but
    // for an image of up to `image_tokens`.
    KvCache(const Hparams& hparams, const Backend& backend, const DevicePlan& device_plan, ggml_type type,
            int32_t n_ctx, int32_t max_batch, int32_t image_tokens = 0);

    int32_t n_past() const { return n_past_; }
    // Changes whenever rows are added, removed or moved; unique across caches. A graph stays valid as long as
    // the version it was built for.
    uint64_t version() const { return version_; }
    uint64_t n_bytes() const;

    // Makes room for n tokens, to be called before range() and advance(). Zeroes the rows after them, which
    // masks on a device are padded with.
    void prepare(int32_t n_tokens);
    // Most tokens that it has room for at a time, whatever it holds; fewer where the context ends.
    int32_t longest_batch() const { return longest_batch_; }
    KvRange range(int32_t i_layer) const;
    // For causal attention, where each token has its own window: aligned down to an attention tile, so it may
    // begin with rows that no token can see.
    KvRange causal_range(int32_t i_layer) const;

    // Commits the n tokens written after the cache.
    void advance(int32_t n_tokens) {
        n_past_ += n_tokens;
        version_ = next_version();
    }

    // Marks this position as one that truncate() can always return to (or a little before): the sliding
    // layers' rows of the window before it are copied to a snapshot before they are dropped.
    void mark() { mark_ = n_past_; }

    // Drops all but the first n tokens. Returns false and changes nothing if the sliding layers no longer
    // hold the window before position n; the caller then has to encode again.
    bool truncate(int32_t n);
    void clear();

    // Rows that a copy of this cache needs: all rows of a full layer, those from first_kept() on of a sliding
    // one, row_bytes() each. read_rows() copies them to `target`.
    int32_t first_kept() const { return tile_start(n_past_, window_); }
    // First position of the attention tile that contains the first row visible to token n.
    static int32_t tile_start(int32_t n, int32_t window) {
        constexpr auto tile = static_cast<int32_t>(kAttentionTile);
        return window_start(n, window) / tile * tile;
    }
    size_t row_bytes(int32_t i_layer) const { return layers_[i_layer].k->nb[1]; }
    void read_rows(int32_t i_layer, bool values, uint8_t* target) const;

    // Replaces the content by rows from read_rows(): n tokens, (k, v) per layer.
    void restore(int32_t n, const std::vector<std::pair<const uint8_t*, const uint8_t*>>& rows);
    // The same by the rows of another cache, from buffer to buffer; that one may have room for another number
    // of tokens. Throws Error(argument) if its layers or its type differ.
    void copy_from(const KvCache& source);

  private:
    struct Layer {
        ggml_tensor* k;
        ggml_tensor* v;
        bool sliding;
    };

    // Rows of the sliding layers before the mark, layer by layer, k before v.
    struct Snapshot {
        int32_t first = 0, end = 0;  // positions
        std::vector<uint8_t> rows;
    };

    void reset_to(int32_t n);
    void allocate(ggml_context* context, ggml_backend_buffer_type_t type, int32_t n_ctx);
    static uint64_t next_version();
    void drop_rows_before(int32_t position);
    void take_snapshot(int32_t position);
    bool restore_snapshot(int32_t n);
    KvRange range_from(int32_t i_layer, int32_t position) const;
    static int32_t window_start(int32_t n, int32_t window) { return std::max(0, n - (window - 1)); }

    int32_t window_;
    int32_t sliding_rows_;
    int32_t longest_batch_;
    int64_t n_padding_rows_;          // zero rows after the last one, for padded masks
    std::atomic<int32_t> n_past_{0};  // may be read while another thread computes
    uint64_t version_ = next_version();
    int32_t base_ = 0;   // position of row 0 of the sliding layers, aligned to a tile
    int32_t mark_ = -1;  // see mark(); -1 if none
    Snapshot snapshot_;
    std::vector<ggml_context_ptr> contexts_;  // of the CPU's layers, then of each device's
    std::vector<ggml_backend_buffer_ptr> buffers_;
    std::vector<Layer> layers_;
};

}  // namespace pydiffusion
