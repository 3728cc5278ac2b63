#include "backend/cpu/attention.h"

#include <algorithm>
#include <vector>

#include "backend/cpu/attention_inputs.h"
#include "backend/cpu/simd_gemm.h"
#include "backend/cpu/tile_attention.h"
#include "util/simd_math.h"

namespace pydiffusion {

namespace {

// Queries lie side by side in the lanes of the vectors, and the same arithmetic is done in all of them: the
// scores are K times Q transposed, the output V transposed times the weights. So neither keys nor values have
// to be turned over, the softmax runs down the lanes, and no lane's result depends on its neighbours, on the
// threads or on how the work was cut.
//
// A task is one key head and a block of its queries; it goes through the rows tile by tile and keeps, per
// query, maximum, sum and output so far (the online softmax of https://arxiv.org/abs/1805.02867).
constexpr int64_t kTileRows = kAttentionTile;
constexpr int64_t kMaxBlock = 64;  // queries
constexpr int64_t kMinBlock = 32;

static_assert(kMinBlock % simd::kLanes == 0, "a block is made of whole vectors");

// --- one task ---

// What a thread works in; a block of B queries and a tile of T rows at a time.
struct Area {
    explicit Area(int64_t head_dim)
        : queries(head_dim * kMaxBlock),
          output(head_dim * kMaxBlock),
          tile(kTileRows * head_dim),
          scores(kTileRows * kMaxBlock) {}

    std::vector<float> queries;  // [head_dim][B]
    std::vector<float> output;   // [head_dim][B]
    std::vector<float> tile;     // [T][head_dim], of keys, then of values
    std::vector<float> scores;   // [T][B], then the weights
    float maximum[kMaxBlock], sum[kMaxBlock];
    int32_t first[kMaxBlock], last[kMaxBlock];  // rows that a query sees
};

void load_queries(Area& area, const AttentionInputs& in, int64_t head, int64_t begin, int64_t n,
                  int64_t block) {
    const int64_t dim = in.head_dim();
    std::vector<float> room(dim);
    for (int64_t i = 0; i < block; ++i) {
        // Lanes behind the last query repeat it: they are computed and thrown away.
        const int64_t query = begin + std::min(i, n - 1);
        const float* source = in.query(head, query, room.data());
        for (int64_t d = 0; d < dim; ++d) area.queries[d * block + i] = source[d];
        area.maximum[i] = kNoMaximum;
        area.sum[i] = 0.0f;
        area.first[i] = in.first(query);
        area.last[i] = in.last(query);
    }
    std::fill_n(area.output.data(), dim * block, 0.0f);
}

// Scores [n][block] of the rows from `row` on become weights; maximum, sum and the output so far follow.
// Without `kMasked` every query sees all of these rows.
template <bool kMasked>
void softmax_tile(Area& area, int32_t row, int64_t n, int64_t dim, int64_t block) {
    float maximum[kMaxBlock], factor[kMaxBlock], sum[kMaxBlock];
    std::copy_n(area.maximum, block, maximum);
    const int32_t *first = area.first, *last = area.last;
    const auto seen = [&](int64_t r, int64_t i) {
        const int32_t at = row + static_cast<int32_t>(r);
        return !kMasked || ((at >= first[i]) & (at <= last[i]));
    };
    for (int64_t r = 0; r < n; ++r) {
        const float* s = area.scores.data() + r * block;
        for (int64_t i = 0; i < block; ++i) {
            const float candidate = seen(r, i) ? s[i] : kNoMaximum;
            maximum[i] = candidate > maximum[i] ? candidate : maximum[i];
        }
    }
    for (int64_t i = 0; i < block; ++i) {
        factor[i] = area.maximum[i] == maximum[i] ? 1.0f : vector_exp(area.maximum[i] - maximum[i]);
        area.maximum[i] = maximum[i];
        sum[i] = area.sum[i] * factor[i];
    }
    for (int64_t r = 0; r < n; ++r) {
        float* s = area.scores.data() + r * block;
        for (int64_t i = 0; i < block; ++i) {
            // s - s: vector_exp alone would make a number of a NaN.
            const float weight = vector_exp(s[i] - maximum[i]) + (s[i] - s[i]);
            s[i] = seen(r, i) ? weight : 0.0f;
            sum[i] += s[i];
        }
    }
    std::copy_n(sum, block, area.sum);
    for (int64_t d = 0; d < dim; ++d) {
        float* o = area.output.data() + d * block;
        for (int64_t i = 0; i < block; ++i) o[i] *= factor[i];
    }
}

void attend_block(Area& area, const AttentionInputs& in, int64_t head, int64_t begin, int64_t n,
                  int64_t block) {
    const int64_t dim = in.head_dim();
    load_queries(area, in, head, begin, n, block);
    const int64_t first = *std::min_element(area.first, area.first + n) / kTileRows * kTileRows;
    const int64_t last = *std::max_element(area.last, area.last + n);
    for (int64_t row = first; row <= last; row += kTileRows) {
        const int64_t n_rows = std::min(kTileRows, in.n_rows() - row);
        in.load_rows(area.tile.data(), in.k, head, row, n_rows);
        std::fill_n(area.scores.data(), n_rows * block, 0.0f);
        simd::multiply_add({area.tile.data(), dim, 1}, area.queries.data(), area.scores.data(), n_rows, dim,
                           block);
        const bool all_visible = *std::max_element(area.first, area.first + block) <= row &&
                                 *std::min_element(area.last, area.last + block) >= row + n_rows - 1;
        (all_visible ? softmax_tile<false> : softmax_tile<true>)(area, static_cast<int32_t>(row), n_rows, dim,
                                                                 block);
        in.load_rows(area.tile.data(), in.v, head, row, n_rows);
        simd::multiply_add({area.tile.data(), 1, dim}, area.scores.data(), area.output.data(), dim, n_rows,
                           block);
    }
    for (int64_t i = 0; i < n; ++i) {
        float* target = in.output(head, begin + i);
        const float share = 1.0f / area.sum[i];
        for (int64_t d = 0; d < dim; ++d) target[d] = area.output[d * block + i] * share;
    }
}

void attend_op(ggml_tensor* dst, int ith, int nth, void* userdata) {
    const AttentionInputs in(dst, userdata);
    const int64_t n_heads = in.n_heads(), n = in.n_queries();
    // Smaller blocks where there is too little for all threads; they convert keys and values more often.
    const int64_t block = n_heads * ((n + kMaxBlock - 1) / kMaxBlock) >= 4 * nth ? kMaxBlock : kMinBlock;
    const int64_t n_blocks = (n + block - 1) / block;
    Area area(in.head_dim());
    for (int64_t task = ith; task < n_heads * n_blocks; task += nth) {
        const int64_t begin = task % n_blocks * block;
        attend_block(area, in, task / n_blocks, begin, std::min(block, n - begin), block);
    }
}

}  // namespace

ggml_tensor* attend(ggml_context* ctx, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, const Causal* causal,
                    gemm::Kernel kernel) {
    const bool by_tiles = kernel == gemm::Kernel::amx && gemm::can_attend(k->type, q->ne[0]);
    std::vector<ggml_tensor*> sources = {k, v};
    append_sources(sources, q);
    ggml_tensor* out =
        ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0] * q->ne[1], q->ne[2], 1, 1, sources.data(),
                       static_cast<int>(sources.size()), by_tiles ? gemm::attend_op : attend_op,
                       GGML_N_TASKS_MAX, const_cast<Causal*>(causal));
    out->extra = q;
    return ggml_set_name(out, by_tiles ? "attend_tiles" : "attend");
}

}  // namespace pydiffusion
