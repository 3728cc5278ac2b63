#include "kv_cache.h"

#include <algorithm>
#include <cstring>

#include "errors.h"
#include "ggml-alloc.h"

namespace pydiffusion {

namespace {

constexpr int32_t kSnapshotSlack = 256;  // tokens

}  // namespace

KvCache::KvCache(const Hyperparameters& hp, const Engine& engine, ggml_type type, int32_t n_ctx,
                 int32_t max_batch)
    : window_(hp.window) {
    // A window of slack behind the window, so that rows are moved once in a window's worth of tokens, not at
    // every batch, and a session can be shortened a little without encoding again.
    const int64_t full_rows = n_ctx;
    sliding_rows_ = static_cast<int32_t>(std::min<int64_t>(full_rows, 2 * int64_t{window_} + max_batch));

    const ggml_init_params params = {(2 * hp.layers.size() + 1) * ggml_tensor_overhead(), nullptr, true};
    require_memory((size_t{8} << 20) + params.mem_size);
    context_.reset(ggml_init(params));
    if (!context_) throw Error(ErrorKind::out_of_memory, "no memory for the cache's description");
    for (const LayerShape& shape : hp.layers) {
        const int64_t width = int64_t{shape.head_dim} * shape.n_head_kv;
        const int64_t n_rows = shape.sliding ? sliding_rows_ : full_rows;
        layers_.push_back({ggml_new_tensor_2d(context_.get(), type, width, n_rows),
                           ggml_new_tensor_2d(context_.get(), type, width, n_rows), shape.sliding});
    }
    const size_t n_bytes =
        ggml_backend_alloc_ctx_tensors_from_buft_size(context_.get(), engine.buffer_type());
    buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(context_.get(), engine.buffer_type()));
    if (!buffer_) {
        throw Error(ErrorKind::out_of_memory,
                    format("no memory for a KV cache of %.1f MB (%d tokens): choose a smaller n_ctx",
                           static_cast<double>(n_bytes) / 1e6, n_ctx));
    }
    ggml_backend_buffer_clear(buffer_.get(), 0);
}

uint64_t KvCache::next_version() {
    static std::atomic<uint64_t> last{0};
    return ++last;
}

uint64_t KvCache::n_bytes() const { return ggml_backend_buffer_get_size(buffer_.get()); }

void KvCache::prepare(int32_t n_tokens) {
    if (n_past_ + n_tokens - base_ > sliding_rows_) drop_rows_before(window_start(n_past_));
}

void KvCache::drop_rows_before(int32_t position) {
    take_snapshot(position);
    const size_t n_drop = static_cast<size_t>(position - base_),
                 n_keep = static_cast<size_t>(n_past_ - position);
    for (const Layer& layer : layers_) {
        if (!layer.sliding) continue;
        for (ggml_tensor* t : {layer.k, layer.v}) {
            char* rows = static_cast<char*>(t->data);
            std::memmove(rows, rows + n_drop * t->nb[1], n_keep * t->nb[1]);
        }
    }
    base_ = position;
    version_ = next_version();
}

void KvCache::take_snapshot(int32_t position) {
    const bool needed = mark_ >= 0 && window_start(mark_) < position;
    if (!needed || snapshot_.end == mark_) return;
    // A little more than the window: a turn may be taken back to just before the mark.
    snapshot_.first = std::max(base_, window_start(mark_) - kSnapshotSlack);
    snapshot_.end = mark_;
    snapshot_.rows.clear();
    for (const Layer& layer : layers_) {
        if (!layer.sliding) continue;
        for (const ggml_tensor* t : {layer.k, layer.v}) {
            const auto* rows = static_cast<const uint8_t*>(t->data);
            snapshot_.rows.insert(snapshot_.rows.end(), rows + (snapshot_.first - base_) * t->nb[1],
                                  rows + (snapshot_.end - base_) * t->nb[1]);
        }
    }
}

KvRange KvCache::range(int32_t i_layer) const {
    const Layer& layer = layers_[i_layer];
    if (!layer.sliding) return {layer.k, layer.v, n_past_, 0, 0};
    const int32_t first = window_start(n_past_);
    return {layer.k, layer.v, n_past_ - base_, first - base_, first};
}

bool KvCache::truncate(int32_t n) {
    if (n >= n_past_) return true;
    if (window_start(n) < base_ && !go_back_to_snapshot(n)) return false;
    n_past_ = n;
    version_ = next_version();
    // What is marked or kept aside behind this point belongs to tokens that are gone.
    if (mark_ > n) mark_ = -1;
    if (snapshot_.end > n) snapshot_ = Snapshot();
    return true;
}

bool KvCache::go_back_to_snapshot(int32_t n) {
    if (snapshot_.rows.empty() || n > snapshot_.end || window_start(n) < snapshot_.first) return false;
    const size_t n_rows = static_cast<size_t>(snapshot_.end - snapshot_.first);
    const uint8_t* source = snapshot_.rows.data();
    for (const Layer& layer : layers_) {
        if (!layer.sliding) continue;
        for (ggml_tensor* t : {layer.k, layer.v}) {
            std::memcpy(t->data, source, n_rows * t->nb[1]);
            source += n_rows * t->nb[1];
        }
    }
    base_ = snapshot_.first;
    return true;
}

void KvCache::clear() {
    n_past_ = base_ = 0;
    version_ = next_version();
    mark_ = -1;
    snapshot_ = Snapshot();
}

const uint8_t* KvCache::rows(int32_t i_layer, bool values) const {
    const Layer& layer = layers_[i_layer];
    const ggml_tensor* t = values ? layer.v : layer.k;
    return static_cast<const uint8_t*>(t->data) + (layer.sliding ? first_kept() - base_ : 0) * t->nb[1];
}

void KvCache::restore(int32_t n, const std::vector<std::pair<const uint8_t*, const uint8_t*>>& rows) {
    clear();
    n_past_ = n;
    base_ = window_start(n);
    for (size_t i = 0; i < layers_.size(); ++i) {
        const size_t n_bytes = static_cast<size_t>(layers_[i].sliding ? n - base_ : n) * layers_[i].k->nb[1];
        std::memcpy(layers_[i].k->data, rows[i].first, n_bytes);
        std::memcpy(layers_[i].v->data, rows[i].second, n_bytes);
    }
}

}  // namespace pydiffusion
