#include "kv_cache/kv_cache.h"

#include <algorithm>
#include <cstring>

#include "backend/ops/ggml_attention.h"
#include "ggml-alloc.h"
#include "kv_cache/kv_layout.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

constexpr int32_t kSnapshotSlack = 256;  // tokens
static_assert(kSnapshotSlack % kAttentionTile == 0, "a snapshot must begin at a tile");

// Moves the bytes [from, from + n) of a tensor to its beginning; the ranges may overlap.
void move_to_front(ggml_tensor* t, size_t from, size_t n) {
    if (n == 0) return;
    if (ggml_backend_buffer_is_host(t->buffer)) {
        auto* data = static_cast<char*>(t->data);
        std::memmove(data, data + from, n);
        return;
    }
    // Rare enough to go through the host: once per window of tokens.
    std::vector<uint8_t> rows(n);
    ggml_backend_tensor_get(t, rows.data(), from, n);
    ggml_backend_tensor_set(t, rows.data(), 0, n);
}

ggml_tensor rows_of(const ggml_tensor* t, int64_t first, int64_t n) {
    ggml_tensor rows = *t;
    rows.ne[1] = n;
    rows.nb[2] = rows.nb[3] = n * rows.nb[1];
    rows.data = static_cast<char*>(t->data) + first * rows.nb[1];
    return rows;
}

// Copies rows [first, first + n) of a tensor to the beginning of another, without the host where it can.
void copy_rows(const ggml_tensor* source, int64_t first, int64_t n, const ggml_tensor* target) {
    if (n == 0) return;
    const ggml_tensor from = rows_of(source, first, n);
    ggml_tensor to = rows_of(target, 0, n);
    ggml_backend_tensor_copy(&from, &to);
}

}  // namespace

KvCache::KvCache(const Hparams& hp, const Backend& backend, const DevicePlan& device_plan, ggml_type type,
                 int32_t n_ctx, int32_t max_batch, int32_t image_tokens)
    : window_(hp.window),
      sliding_rows_(static_cast<int32_t>(kv_rows(hp, true, n_ctx, max_batch, image_tokens))),
      // After first_kept(), of which a sliding layer still holds all rows.
      longest_batch_(sliding_rows_ == n_ctx
                         ? n_ctx
                         : sliding_rows_ - (window_ + static_cast<int32_t>(kAttentionTile) - 2)),
      n_padding_rows_(backend.on_device() ? ggml_ops::kMaskPadding : 0) {
    require_fitting_heads(hp, type);
    if (backend.on_device() && !backend.can_store(type)) {
        throw Error(
            ErrorKind::unsupported,
            format("%s does not support a KV cache of type %s: choose another kv_type, or n_gpu_layers=0",
                   backend.name(), ggml_type_name(type)));
    }
    const ggml_init_params params = {(2 * hp.layers.size() + 1) * ggml_tensor_overhead(), nullptr, true};
    require_memory((size_t{8} << 20) + 2 * params.mem_size);
    for (int32_t device = kCpuDevice; device < backend.n_devices(); ++device) {
        contexts_.emplace_back(ggml_init(params));
        if (!contexts_.back())
            throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate the KV cache's tensors");
    }
    for (int32_t i = 0; i < hp.n_layer; ++i) {
        const LayerShape& shape = hp.layers[i];
        ggml_context* context = contexts_[device_plan.layer_device(i) - kCpuDevice].get();
        const int64_t width = int64_t{shape.head_dim} * shape.n_head_kv;
        const int64_t rows = kv_rows(hp, shape.sliding, n_ctx, max_batch, image_tokens) + n_padding_rows_;
        layers_.push_back({ggml_new_tensor_2d(context, type, width, rows),
                           ggml_new_tensor_2d(context, type, width, rows), shape.sliding});
    }
    for (int32_t device = kCpuDevice; device < backend.n_devices(); ++device)
        allocate(contexts_[device - kCpuDevice].get(), backend.buffer_type(device), n_ctx);
}

void KvCache::allocate(ggml_context* context, ggml_backend_buffer_type_t type, int32_t n_ctx) {
    if (!ggml_get_first_tensor(context)) return;
    const size_t n_bytes = ggml_backend_alloc_ctx_tensors_from_buft_size(context, type);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(context, type);
    if (!buffer) {
        throw Error(
            ErrorKind::out_of_memory,
            format(
                "out of memory: failed to allocate a KV cache of %.1f MB (%d tokens): choose a smaller n_ctx",
                static_cast<double>(n_bytes) / 1e6, n_ctx));
    }
    buffers_.emplace_back(buffer);
    ggml_backend_buffer_clear(buffer, 0);
}

uint64_t KvCache::next_version() {
    static std::atomic<uint64_t> last{0};
    return ++last;
}

uint64_t KvCache::n_bytes() const {
    uint64_t n_bytes = 0;
    for (const auto& buffer : buffers_) n_bytes += ggml_backend_buffer_get_size(buffer.get());
    return n_bytes;
}

void KvCache::prepare(int32_t n_tokens) {
    if (n_past_ + n_tokens - base_ > sliding_rows_) drop_rows_before(first_kept());
    // Padding rows are masked but still read, and a NaN left there would spread to the sums over all rows.
    for (const Layer& layer : layers_) {
        const size_t end = static_cast<size_t>((layer.sliding ? n_past_ - base_ : n_past_.load()) + n_tokens);
        for (ggml_tensor* t : {layer.k, layer.v})
            ggml_backend_tensor_memset(t, 0, end * t->nb[1], n_padding_rows_ * t->nb[1]);
    }
}

void KvCache::drop_rows_before(int32_t position) {
    take_snapshot(position);
    const size_t n_drop = static_cast<size_t>(position - base_),
                 n_keep = static_cast<size_t>(n_past_ - position);
    for (const Layer& layer : layers_) {
        if (!layer.sliding) continue;
        for (ggml_tensor* t : {layer.k, layer.v}) move_to_front(t, n_drop * t->nb[1], n_keep * t->nb[1]);
    }
    base_ = position;
    version_ = next_version();
}

void KvCache::take_snapshot(int32_t position) {
    const bool needed = mark_ >= 0 && tile_start(mark_, window_) < position;
    if (!needed || snapshot_.end == mark_) return;
    // A little more than the window: a turn may be rolled back to just before the mark.
    snapshot_.first = std::max(base_, tile_start(mark_, window_) - kSnapshotSlack);
    snapshot_.end = mark_;
    snapshot_.rows.clear();
    for (const Layer& layer : layers_) {
        if (!layer.sliding) continue;
        for (const ggml_tensor* t : {layer.k, layer.v}) {
            const size_t n_bytes = static_cast<size_t>(snapshot_.end - snapshot_.first) * t->nb[1];
            snapshot_.rows.resize(snapshot_.rows.size() + n_bytes);
            ggml_backend_tensor_get(t, snapshot_.rows.data() + snapshot_.rows.size() - n_bytes,
                                    (snapshot_.first - base_) * t->nb[1], n_bytes);
        }
    }
}

KvRange KvCache::range(int32_t i_layer) const { return range_from(i_layer, window_start(n_past_, window_)); }

KvRange KvCache::causal_range(int32_t i_layer) const { return range_from(i_layer, first_kept()); }

KvRange KvCache::range_from(int32_t i_layer, int32_t position) const {
    const Layer& layer = layers_[i_layer];
    if (!layer.sliding) return {layer.k, layer.v, n_past_, 0, 0};
    return {layer.k, layer.v, n_past_ - base_, position - base_, position};
}

bool KvCache::truncate(int32_t n) {
    if (n >= n_past_) return true;
    if (tile_start(n, window_) < base_ && !restore_snapshot(n)) return false;
    n_past_ = n;
    version_ = next_version();
    // A mark or snapshot beyond this position belongs to dropped tokens.
    if (mark_ > n) mark_ = -1;
    if (snapshot_.end > n) snapshot_ = Snapshot();
    return true;
}

bool KvCache::restore_snapshot(int32_t n) {
    if (snapshot_.rows.empty() || n > snapshot_.end || tile_start(n, window_) < snapshot_.first) return false;
    const size_t n_rows = static_cast<size_t>(snapshot_.end - snapshot_.first);
    const uint8_t* source = snapshot_.rows.data();
    for (const Layer& layer : layers_) {
        if (!layer.sliding) continue;
        for (ggml_tensor* t : {layer.k, layer.v}) {
            ggml_backend_tensor_set(t, source, 0, n_rows * t->nb[1]);
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

void KvCache::read_rows(int32_t i_layer, bool values, uint8_t* target) const {
    const Layer& layer = layers_[i_layer];
    const ggml_tensor* t = values ? layer.v : layer.k;
    const int32_t first = layer.sliding ? first_kept() : 0;
    if (first == n_past_) return;
    ggml_backend_tensor_get(t, target, (layer.sliding ? first - base_ : 0) * t->nb[1],
                            (n_past_ - first) * t->nb[1]);
}

void KvCache::restore(int32_t n, const std::vector<std::pair<const uint8_t*, const uint8_t*>>& rows) {
    reset_to(n);
    for (size_t i = 0; i < layers_.size(); ++i) {
        const size_t n_bytes = static_cast<size_t>(layers_[i].sliding ? n - base_ : n) * layers_[i].k->nb[1];
        if (n_bytes == 0) continue;
        ggml_backend_tensor_set(layers_[i].k, rows[i].first, 0, n_bytes);
        ggml_backend_tensor_set(layers_[i].v, rows[i].second, 0, n_bytes);
    }
}

void KvCache::copy_from(const KvCache& source) {
    const auto is_alike = [](const Layer& a, const Layer& b) {
        return a.sliding == b.sliding && a.k->type == b.k->type && a.k->ne[0] == b.k->ne[0];
    };
    if (window_ != source.window_ ||
        !std::equal(layers_.begin(), layers_.end(), source.layers_.begin(), source.layers_.end(), is_alike)) {
        throw Error(ErrorKind::argument, "the KV cache to copy is of another model or type");
    }
    reset_to(source.n_past_);
    for (size_t i = 0; i < layers_.size(); ++i) {
        const Layer &from = source.layers_[i], &to = layers_[i];
        const int32_t first = to.sliding ? base_ - source.base_ : 0;
        const int32_t n = to.sliding ? n_past_ - base_ : n_past_.load();
        copy_rows(from.k, first, n, to.k);
        copy_rows(from.v, first, n, to.v);
    }
}

// Drops everything and makes room for n tokens whose rows the caller writes.
void KvCache::reset_to(int32_t n) {
    clear();
    n_past_ = n;
    base_ = first_kept();
}

}  // namespace pydiffusion
