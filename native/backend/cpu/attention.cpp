#include "backend/cpu/attention.h"

#include <algorithm>
#include <vector>

#include "backend/cpu/attention_inputs.h"
#include "backend/cpu/custom_node.h"
#include "backend/cpu/simd_gemm.h"
#include "backend/cpu/tile_attention.h"
#include "util/simd_math.h"

namespace pydiffusion {

namespace {

// Each SIMD lane is one query, and all lanes do the same arithmetic: scores = K Q^T, output = V^T weights. So
// neither K nor V needs a transpose, the softmax needs no reduction across lanes, and no result depends on
// neighbouring queries, on the number of threads or on how the work is split.
//
// A task is one KV head and a block of its queries. It reads the rows tile by tile and keeps a running
// maximum, sum and output per query (online softmax, https://arxiv.org/abs/1805.02867).
constexpr int64_t kTileRows = kAttentionTile;
constexpr int64_t kMaxBlock = 64;  // queries
constexpr int64_t kMinBlock = 32;

static_assert(kMinBlock % simd::kLanes == 0, "a block must be whole vectors");

// --- one task ---

// Per-thread buffers, for a block of B queries and a tile of T rows.
struct Workspace {
    explicit Workspace(int64_t head_dim)
        : queries(head_dim * kMaxBlock),
          output(head_dim * kMaxBlock),
          tile(kTileRows * head_dim),
          scores(kTileRows * kMaxBlock) {}

    std::vector<float> queries;  // [head_dim][B]
    std::vector<float> output;   // [head_dim][B]
    std::vector<float> tile;     // [T][head_dim], of K, then of V
    std::vector<float> scores;   // [T][B], then the weights
    float maximum[kMaxBlock], sum[kMaxBlock];
    int32_t first[kMaxBlock], last[kMaxBlock];  // visible rows of each query
};

void load_queries(Workspace& ws, const AttentionInputs& in, int64_t head, int64_t begin, int64_t n,
                  int64_t block) {
    const int64_t dim = in.head_dim();
    std::vector<float> scratch(dim);
    for (int64_t i = 0; i < block; ++i) {
        // Padding lanes repeat the last query; their results are discarded.
        const int64_t query = begin + std::min(i, n - 1);
        const float* source = in.query(head, query, scratch.data());
        for (int64_t d = 0; d < dim; ++d) ws.queries[d * block + i] = source[d];
        ws.maximum[i] = kInitialMaximum;
        ws.sum[i] = 0.0f;
        const Causal::Rows rows = in.visible(query);
        ws.first[i] = rows.first;
        ws.last[i] = rows.last;
    }
    std::fill_n(ws.output.data(), dim * block, 0.0f);
}

// Turns the scores [n][block] of the rows from `row` on into weights, and updates maximum, sum and output.
// Without kMasked, all of these rows are visible to every query.
template <bool kMasked>
void softmax_tile(Workspace& ws, int32_t row, int64_t n, int64_t dim, int64_t block) {
    float maximum[kMaxBlock], factor[kMaxBlock], sum[kMaxBlock];
    std::copy_n(ws.maximum, block, maximum);
    const int32_t *first = ws.first, *last = ws.last;
    const auto visible = [&](int64_t r, int64_t i) {
        const int32_t at = row + static_cast<int32_t>(r);
        return !kMasked || ((at >= first[i]) & (at <= last[i]));
    };
    for (int64_t r = 0; r < n; ++r) {
        const float* s = ws.scores.data() + r * block;
        for (int64_t i = 0; i < block; ++i) {
            const float candidate = visible(r, i) ? s[i] : kInitialMaximum;
            maximum[i] = candidate > maximum[i] ? candidate : maximum[i];
        }
    }
    for (int64_t i = 0; i < block; ++i) {
        factor[i] = ws.maximum[i] == maximum[i] ? 1.0f : vector_exp(ws.maximum[i] - maximum[i]);
        ws.maximum[i] = maximum[i];
        sum[i] = ws.sum[i] * factor[i];
    }
    for (int64_t r = 0; r < n; ++r) {
        float* s = ws.scores.data() + r * block;
        for (int64_t i = 0; i < block; ++i) {
            // s - s propagates NaN, which vector_exp does not.
            const float weight = vector_exp(s[i] - maximum[i]) + (s[i] - s[i]);
            s[i] = visible(r, i) ? weight : 0.0f;
            sum[i] += s[i];
        }
    }
    std::copy_n(sum, block, ws.sum);
    for (int64_t d = 0; d < dim; ++d) {
        float* o = ws.output.data() + d * block;
        for (int64_t i = 0; i < block; ++i) o[i] *= factor[i];
    }
}

void attend_block(Workspace& ws, const AttentionInputs& in, int64_t head, int64_t begin, int64_t n,
                  int64_t block) {
    const int64_t dim = in.head_dim();
    load_queries(ws, in, head, begin, n, block);
    const int64_t first = *std::min_element(ws.first, ws.first + n) / kTileRows * kTileRows;
    const int64_t last = *std::max_element(ws.last, ws.last + n);
    for (int64_t row = first; row <= last; row += kTileRows) {
        const int64_t n_rows = std::min(kTileRows, in.n_rows() - row);
        in.load_rows(ws.tile.data(), in.k, head, row, n_rows);
        std::fill_n(ws.scores.data(), n_rows * block, 0.0f);
        simd::multiply_add({ws.tile.data(), dim, 1}, ws.queries.data(), ws.scores.data(), n_rows, dim, block);
        const bool all_visible = *std::max_element(ws.first, ws.first + block) <= row &&
                                 *std::min_element(ws.last, ws.last + block) >= row + n_rows - 1;
        (all_visible ? softmax_tile<false> : softmax_tile<true>)(ws, static_cast<int32_t>(row), n_rows, dim,
                                                                 block);
        in.load_rows(ws.tile.data(), in.v, head, row, n_rows);
        simd::multiply_add({ws.tile.data(), 1, dim}, ws.scores.data(), ws.output.data(), dim, n_rows, block);
    }
    for (int64_t i = 0; i < n; ++i) {
        float* target = in.output(head, begin + i);
        const float inverse_sum = 1.0f / ws.sum[i];
        for (int64_t d = 0; d < dim; ++d) target[d] = ws.output[d * block + i] * inverse_sum;
    }
}

void attend_op(ggml_tensor* dst, int ith, int nth, void* userdata) {
    const AttentionInputs in(dst, userdata);
    const int64_t n_heads = in.n_heads(), n = in.n_queries();
    // Smaller blocks, which convert K and V more often, if there are too few tasks for all threads.
    const int64_t block =
        n_heads * ((n + kMaxBlock - 1) / kMaxBlock) >= 4 * n_threads_for(nth) ? kMaxBlock : kMinBlock;
    const int64_t n_blocks = (n + block - 1) / block;
    Workspace ws(in.head_dim());
    for (int64_t task = ith; task < n_heads * n_blocks; task += nth) {
        const int64_t begin = task % n_blocks * block;
        attend_block(ws, in, task / n_blocks, begin, std::min(block, n - begin), block);
    }
}

}  // namespace

ggml_tensor* attend(ggml_context* ctx, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, const Causal* causal,
                    gemm::Kernel kernel) {
    const bool use_tiles = kernel == gemm::Kernel::amx && gemm::can_attend(k->type, q->ne[0]);
    std::vector<ggml_tensor*> sources = {k, v};
    append_sources(sources, q);
    ggml_tensor* out =
        ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0] * q->ne[1], q->ne[2], 1, 1, sources.data(),
                       static_cast<int>(sources.size()), use_tiles ? gemm::attend_op : attend_op,
                       GGML_N_TASKS_MAX, const_cast<Causal*>(causal));
    out->extra = q;
    return ggml_set_name(out, use_tiles ? "attend_tiles" : "attend");
}

bool is_attention(const ggml_tensor* node) {
    return is_custom_node_of(node, attend_op) || is_custom_node_of(node, gemm::attend_op);
}

}  // namespace pydiffusion
