// The KV cache: which rows a layer holds, how they move, and the ways back.
#include "kv_cache/kv_cache.h"

#include <limits>

#include "backend/ops/ggml_attention.h"
#include "kv_cache/kv_layout.h"
#include "small_model.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

Hparams hparams_of(const SmallModel& model) {
    const TemporaryFolder folder;
    return Hparams(GgufFile(folder.write("model.gguf", model.image().bytes())));
}

SmallModel with_window(uint32_t window) {
    SmallModel model;
    model.window = window;
    return model;
}

constexpr int32_t kMaxBatch = 64;

// A cache of float32 whose row of a token is filled with a number that says whose it is.
struct Filled {
    explicit Filled(const SmallModel& model, const char* device = "cpu", int32_t n_ctx = 4000)
        : hp(hparams_of(model)),
          backend(1, device),
          plan{hp.n_layer, backend.on_device() ? std::vector<int32_t>{hp.n_layer} : std::vector<int32_t>(),
               0},
          cache(hp, backend, plan, GGML_TYPE_F32, n_ctx, kMaxBatch) {}

    static float value_of(int32_t position, int32_t i_layer, bool is_v) {
        return static_cast<float>(8 * position + 2 * i_layer + is_v);
    }

    void append(int32_t n) {
        cache.prepare(n);
        for (int32_t i = 0; i < hp.n_layer; ++i) {
            const KvRange range = cache.range(i);
            for (const bool is_v : {false, true}) {
                ggml_tensor* t = is_v ? range.v : range.k;
                for (int32_t token = 0; token < n; ++token) {
                    const std::vector<float> row(t->ne[0], value_of(cache.n_past() + token, i, is_v));
                    ggml_backend_tensor_set(t, row.data(), (range.write + token) * t->nb[1], t->nb[1]);
                }
            }
        }
        cache.advance(n);
    }

    void append_until(int32_t n_past, int32_t n_at_once = 50) {
        while (cache.n_past() < n_past) append(std::min(n_at_once, n_past - cache.n_past()));
    }

    // Checks where a layer's rows begin, and that each holds what was written for its position.
    void check(const KvRange& range, int32_t i_layer, int32_t first_position) const {
        CAPTURE(i_layer);
        CAPTURE(cache.n_past());
        CHECK(range.first_position == first_position);
        CHECK(range.n_visible(0) == cache.n_past() - first_position);
        int32_t n_wrong = 0;
        for (const bool is_v : {false, true}) {
            const ggml_tensor* t = is_v ? range.v : range.k;
            std::vector<float> row(t->ne[0]);
            for (int64_t r = range.first; r < range.write; ++r) {
                ggml_backend_tensor_get(t, row.data(), r * t->nb[1], t->nb[1]);
                const auto position = static_cast<int32_t>(range.first_position + r - range.first);
                const float expected = value_of(position, i_layer, is_v);
                n_wrong += row.front() != expected || row.back() != expected;
            }
        }
        CHECK(n_wrong == 0);
    }

    // Layers 0 and 2 slide, layer 1 is full.
    void check_all() const {
        const int32_t seen = std::max(0, cache.n_past() - (hp.window - 1));
        const auto tile = static_cast<int32_t>(kAttentionTile);
        for (const int32_t i : {0, 2}) {
            check(cache.range(i), i, seen);
            check(cache.causal_range(i), i, seen / tile * tile);
        }
        check(cache.range(1), 1, 0);
        check(cache.causal_range(1), 1, 0);
    }

    Hparams hp;
    Backend backend;
    DevicePlan plan;
    KvCache cache;
};

// Position of row 0 of the sliding layers.
int32_t base_of(const KvCache& cache) {
    const KvRange range = cache.range(0);
    return range.first_position - static_cast<int32_t>(range.first);
}

std::vector<std::vector<uint8_t>> rows_of(const Filled& filled) {
    const KvCache& cache = filled.cache;
    std::vector<std::vector<uint8_t>> rows;
    for (int32_t i = 0; i < filled.hp.n_layer; ++i) {
        const int32_t n = filled.hp.layers[i].sliding ? cache.n_past() - cache.first_kept() : cache.n_past();
        for (const bool is_v : {false, true}) {
            rows.emplace_back(n * cache.row_bytes(i));
            cache.read_rows(i, is_v, rows.back().data());
        }
    }
    return rows;
}

void restore(KvCache& cache, int32_t n, const std::vector<std::vector<uint8_t>>& rows) {
    std::vector<std::pair<const uint8_t*, const uint8_t*>> by_layer;
    for (size_t i = 0; i < rows.size(); i += 2) by_layer.emplace_back(rows[i].data(), rows[i + 1].data());
    cache.restore(n, by_layer);
}

}  // namespace

TEST_CASE("rows of a layer") {
    const Hparams hp = hparams_of(with_window(100));
    CHECK(kv_rows(hp, false, 4000, 64) == 4000);
    CHECK(kv_rows(hp, true, 4000, 64) == 264);  // the window, as much again, the batch
    CHECK(kv_rows(hp, true, 200, 64) == 200);   // never more than the context
    CHECK(kv_rows(hparams_of(with_window(10)), true, 4000, 64) == 138);  // the slack is at least a tile
    CHECK(kv_rows(hp, true, 4000, 64, 100) == 264);                      // an image that fits into the slack
    CHECK(kv_rows(hp, true, 4000, 64, 200) == 364);                      // the window, a tile, the image
    CHECK(kv_rows(hp, true, 300, 64, 200) == 300);
    CHECK(kv_visible_rows(hp, false, 4000, 64) == 4000);
    CHECK(kv_visible_rows(hp, true, 4000, 16) == 178);  // 100 + 62 + 16
    CHECK(kv_visible_rows(hp, true, 150, 16) == 150);
}

TEST_CASE("an image longer than a batch fits wherever it begins") {
    for (const int32_t window : {10, 100}) {
        const Hparams hp = hparams_of(with_window(window));
        const Backend backend(1, "cpu");
        KvCache cache(hp, backend, {hp.n_layer, {}, 0}, GGML_TYPE_F32, 4000, kMaxBatch, 300);
        REQUIRE(cache.longest_batch() >= 300);
        CHECK(KvCache(hp, backend, {hp.n_layer, {}, 0}, GGML_TYPE_F32, 4000, kMaxBatch).longest_batch() <
              300);
        for (const int32_t n :
             {cache.longest_batch(), 1, 63, cache.longest_batch(), 64, cache.longest_batch()}) {
            cache.prepare(n);
            const KvRange range = cache.causal_range(0);
            CHECK(range.write + n <= range.k->ne[1]);
            CHECK(range.first_position <= std::max(0, cache.n_past() - window + 1));
            cache.advance(n);
        }
    }
}

TEST_CASE("heads have to be whole blocks of the cache's type") {
    SmallModel model;
    model.head_dim_swa = 48;
    const Hparams hp = hparams_of(model);
    require_fitting_heads(hp, GGML_TYPE_F16);
    CHECK_ERROR(require_fitting_heads(hp, GGML_TYPE_Q8_0), argument, "48");
    require_fitting_heads(hparams_of(SmallModel()), GGML_TYPE_Q8_0);
}

TEST_CASE("what is visible, worked out by hand") {
    // Position n sees from n - 99 on; causal ranges begin at the multiple of 64 before.
    CHECK(KvCache::tile_start(0, 100) == 0);
    CHECK(KvCache::tile_start(162, 100) == 0);
    CHECK(KvCache::tile_start(163, 100) == 64);
    CHECK(KvCache::tile_start(250, 100) == 128);
    Filled filled(with_window(100));
    filled.append_until(250);
    CHECK(base_of(filled.cache) == 0);  // 264 rows hold all of them
    const KvRange range = filled.cache.range(0), causal = filled.cache.causal_range(0);
    CHECK(range.write == 250);
    CHECK(range.first == 151);
    CHECK(range.first_position == 151);
    CHECK(range.n_visible(16) == 115);
    CHECK(causal.first == 128);
    CHECK(causal.first_position == 128);
    const KvRange full = filled.cache.range(1);
    CHECK(full.write == 250);
    CHECK(full.first == 0);
    CHECK(full.n_visible(16) == 266);
}

TEST_CASE("rows move to the front when there is no room behind them") {
    Filled filled(with_window(100));
    filled.append_until(250);
    const uint64_t version = filled.cache.version();
    filled.cache.prepare(14);  // 264 rows: just fits
    CHECK(base_of(filled.cache) == 0);
    CHECK(filled.cache.version() == version);
    filled.cache.prepare(15);
    CHECK(base_of(filled.cache) == 128);  // the tile that position 151 is in
    CHECK(filled.cache.version() != version);
    CHECK(filled.cache.n_past() == 250);
    const KvRange range = filled.cache.range(0);
    CHECK(range.write == 122);
    CHECK(range.first == 23);
    CHECK(range.first_position == 151);
    CHECK(filled.cache.range(1).write == 250);  // full layers don't
    filled.check_all();
}

TEST_CASE("rows keep their positions however they are appended") {
    for (const uint32_t window : {1, 63, 64, 65, 100}) {
        for (const int32_t n_at_once : {1, 17, 64}) {
            CAPTURE(window);
            CAPTURE(n_at_once);
            Filled filled(with_window(window));
            for (const int32_t n_past : {1, 64, 300, 517, 1000}) {
                filled.append_until(n_past, n_at_once);
                filled.check_all();
            }
        }
    }
}

TEST_CASE("truncated as far as the window before is there") {
    Filled filled(with_window(100));
    filled.append_until(250);
    filled.append(64);
    REQUIRE(base_of(filled.cache) == 128);
    const uint64_t version = filled.cache.version();
    CHECK(filled.cache.truncate(314));  // all of them: nothing to do
    CHECK(filled.cache.truncate(9999));
    CHECK_FALSE(filled.cache.truncate(226));  // sees 127, whose tile begins at 64
    CHECK_FALSE(filled.cache.truncate(0));
    CHECK(filled.cache.n_past() == 314);
    CHECK(filled.cache.version() == version);
    CHECK(filled.cache.truncate(227));
    CHECK(filled.cache.n_past() == 227);
    CHECK(filled.cache.version() != version);
    filled.check_all();
    filled.append_until(400);
    filled.check_all();
}

TEST_CASE("cleared") {
    Filled filled(with_window(100));
    filled.append_until(500);
    filled.cache.mark();
    filled.cache.clear();
    CHECK(filled.cache.n_past() == 0);
    CHECK(base_of(filled.cache) == 0);
    CHECK(filled.cache.range(1).write == 0);
    filled.append_until(300);
    filled.check_all();
}

TEST_CASE("back to a mark, from however far") {
    Filled filled(with_window(100));
    filled.append_until(480);
    filled.cache.mark();
    SUBCASE("without any row moved since") { filled.append(1); }
    SUBCASE("after a few moves") { filled.append_until(1500); }
    SUBCASE("in steps of one") { filled.append_until(900, 1); }
    CHECK(filled.cache.truncate(480));
    CHECK(filled.cache.n_past() == 480);
    filled.check_all();
    filled.append_until(1100);  // and once more: the mark is still there
    CHECK(filled.cache.truncate(480));
    filled.check_all();
}

TEST_CASE("a little before the mark, but not far") {
    // 600 + 600 + 64 rows. The mark at 1200 sees from 601 on, whose tile begins at 576: kept are 256 rows
    // more.
    Filled filled(with_window(600));
    filled.append_until(1200);
    filled.cache.mark();
    filled.append(64);
    REQUIRE(base_of(filled.cache) == 0);
    filled.append_until(3000);
    REQUIRE(base_of(filled.cache) > 576);
    CHECK_FALSE(filled.cache.truncate(918));  // sees 319
    CHECK(filled.cache.n_past() == 3000);
    CHECK(filled.cache.truncate(919));  // sees 320
    filled.check_all();
    // The mark was behind that, and is forgotten.
    filled.append_until(3000);
    CHECK_FALSE(filled.cache.truncate(1200));
}

TEST_CASE("a mark moves on") {
    Filled filled(with_window(100));
    filled.append_until(300);
    filled.cache.mark();
    filled.append_until(1000);
    filled.cache.mark();
    filled.append_until(1700);
    CHECK_FALSE(filled.cache.truncate(300));
    CHECK(filled.cache.truncate(1000));
    filled.check_all();
}

TEST_CASE("read and restored") {
    for (const int32_t n_past : {0, 1, 99, 163, 300, 1000}) {
        CAPTURE(n_past);
        Filled filled(with_window(100)), copy(with_window(100));
        filled.append_until(n_past);
        const auto rows = rows_of(filled);
        copy.append_until(700);  // what it held is given up
        const uint64_t version = copy.cache.version();
        restore(copy.cache, n_past, rows);
        CHECK(copy.cache.n_past() == n_past);
        CHECK(copy.cache.version() != version);
        CHECK(base_of(copy.cache) == copy.cache.first_kept());
        copy.check_all();
        CHECK(rows_of(copy) == rows);
        copy.append_until(n_past + 500);
        copy.check_all();
    }
}

TEST_CASE("copied from a cache of another size") {
    for (const int32_t n_past : {0, 1, 99, 163, 300, 1000}) {
        for (const int32_t n_ctx : {1600, 4000}) {
            CAPTURE(n_past);
            CAPTURE(n_ctx);
            Filled filled(with_window(100)), copy(with_window(100), "cpu", n_ctx);
            filled.append_until(n_past);
            filled.cache.mark();
            copy.append_until(700);  // what it held, and its mark, are given up
            copy.cache.mark();
            const uint64_t version = copy.cache.version();
            copy.cache.copy_from(filled.cache);
            CHECK(copy.cache.n_past() == n_past);
            CHECK(copy.cache.version() != version);
            CHECK(copy.cache.version() != filled.cache.version());
            CHECK(base_of(copy.cache) == copy.cache.first_kept());
            copy.check_all();
            CHECK(rows_of(copy) == rows_of(filled));
            copy.append_until(n_past + 500);
            copy.check_all();
            CHECK(filled.cache.n_past() == n_past);
            filled.check_all();
            // As after restore(), there is no mark: only what the window still holds is a way back.
            const bool held = KvCache::tile_start(n_past, 100) >= base_of(copy.cache);
            CHECK(copy.cache.truncate(n_past) == held);
        }
    }
}

TEST_CASE("copied after the window has slid, and after rows were given back") {
    Filled filled(with_window(100)), copy(with_window(100));
    filled.append_until(1000, 1);
    REQUIRE(base_of(filled.cache) < filled.cache.first_kept());  // rows that a copy does not need
    REQUIRE(base_of(filled.cache) > 0);
    copy.cache.copy_from(filled.cache);
    copy.check_all();
    REQUIRE(filled.cache.truncate(990));
    copy.cache.copy_from(filled.cache);
    CHECK(copy.cache.n_past() == 990);
    copy.check_all();
}

TEST_CASE("copied between devices") {
    for (const auto& [from, to] : {std::pair{"host", "host"}, {"host", "cpu"}, {"cpu", "host"}}) {
        CAPTURE(from);
        CAPTURE(to);
        Filled filled(with_window(100), from), copy(with_window(100), to, 2000);
        filled.append_until(1000);
        copy.cache.copy_from(filled.cache);
        CHECK(rows_of(copy) == rows_of(filled));
        copy.append_until(1300);
        copy.check_all();
    }
}

TEST_CASE("a cache of other layers can't be copied") {
    Filled filled(with_window(100)), wider(with_window(101));
    SmallModel model = with_window(100);
    model.head_dim = 32;
    Filled narrower(model);
    model = with_window(100);
    model.sliding = {true, false};
    Filled shorter(model);
    model.sliding = {true, true, true};
    Filled sliding(model);
    KvCache half(filled.hp, filled.backend, filled.plan, GGML_TYPE_F16, 4000, kMaxBatch);
    filled.append_until(300);
    for (KvCache* other : {&wider.cache, &narrower.cache, &shorter.cache, &sliding.cache, &half}) {
        CHECK_ERROR(other->copy_from(filled.cache), argument, "another model or type");
        CHECK(other->n_past() == 0);
        CHECK_ERROR(filled.cache.copy_from(*other), argument, "another model or type");
        CHECK(filled.cache.n_past() == 300);
    }
    filled.check_all();
}

TEST_CASE("versions are never those of another cache") {
    const Filled a(with_window(100)), b(with_window(100));
    CHECK(a.cache.version() != b.cache.version());
}

TEST_CASE("on a device: the rows moved there too, and zeros behind the batch") {
    Filled filled(with_window(100), "host");
    filled.append_until(1000);
    filled.check_all();
    const KvRange range = filled.cache.range(0);
    REQUIRE(range.k->ne[1] == 264 + ggml_ops::kMaskPadding);
    // As if another had left NaN there.
    const std::vector<float> nan(range.k->ne[0] * ggml_ops::kMaskPadding,
                                 std::numeric_limits<float>::quiet_NaN());
    constexpr int32_t n = 5;
    REQUIRE(range.write + n <= 264);
    const size_t at = (range.write + n) * range.k->nb[1];
    ggml_backend_tensor_set(range.k, nan.data(), at, nan.size() * sizeof(float));
    filled.cache.prepare(n);
    std::vector<float> found(nan.size(), 1.0f);
    ggml_backend_tensor_get(range.k, found.data(), at, found.size() * sizeof(float));
    CHECK(found == std::vector<float>(found.size(), 0.0f));
}

}  // namespace testing
}  // namespace pydiffusion
