#include "backend/cpu/tile_attention.h"

#include <memory>

#include "backend/cpu/amx/intrinsics.h"
#include "backend/cpu/amx/pack.h"
#include "backend/cpu/attention_inputs.h"
#include "backend/cpu/custom_node.h"
#include "util/aligned_buffer.h"
#include "util/simd_math.h"

namespace pydiffusion {
namespace gemm {

#if defined(PYDIFFUSION_AMX)

namespace {

// As in attention.cpp: each lane is one query, scores = K Q^T, output = V^T weights, and a task is one KV
// head and a block of its queries, which reads the rows tile by tile.
constexpr int64_t kRows = kAttentionTile;  // of K and V, at a time
constexpr int64_t kMaxBlock = 256;         // queries
constexpr int64_t kMinBlock = 128;
constexpr int64_t kRowTiles = kRows / kTileRows, kRowDepth = kRows / kTileDepth;

// Tiles of values that are split into bfloat16 halves: all high halves, then all low ones.
struct Halves {
    AlignedBuffer<uint16_t> data;
    int64_t n = 0;

    void resize(int64_t size) {
        n = size;
        data = allocate<uint16_t>(2 * n);
    }
    uint16_t* high(int64_t i) const { return data.get() + i; }
    uint16_t* low(int64_t i) const { return data.get() + n + i; }
};

// Per-thread buffers. Accumulators are as in tile_gemm(), for two tiles of rows (or of head dims) at a time.
struct Workspace {
    int64_t dim = 0;
    AlignedBuffer<float> rows;        // [kRows][dim], of K, then of V
    AlignedBuffer<float> query_rows;  // [kTileRows][dim], if computed on demand
    AlignedBuffer<float> residuals;   // [kTileRows][dim], queries minus their high halves
    Halves queries;                   // activations: [query tile][dim / 32]
    Halves keys;                      // weights: [row tile][dim / 32]
    Halves values;                    // weights, transposed: [dim / 16][kRowDepth]
    Halves weights;                   // activations: [query tile][kRowDepth]
    AlignedBuffer<float> scores;      // [kRows / 32] pairs of accumulators
    AlignedBuffer<float> output;      // [dim / 32] pairs of accumulators
    alignas(64) float maximum[kMaxBlock], sum[kMaxBlock], factor[kMaxBlock];
    alignas(64) int32_t first[kMaxBlock], last[kMaxBlock];

    void prepare(int64_t head_dim) {
        if (dim == head_dim) return;
        dim = head_dim;
        rows = allocate<float>(kRows * dim);
        query_rows = allocate<float>(kTileRows * dim);
        residuals = allocate<float>(kTileRows * dim);
        queries.resize(kMaxBlock * dim);
        keys.resize(kRows * dim);
        values.resize(kRows * dim);
        weights.resize(kRows * kMaxBlock);
        scores = allocate<float>(kRows * kMaxBlock);
        output = allocate<float>(dim * kMaxBlock);
    }
};

Workspace& workspace_for(int64_t head_dim) {
    static thread_local std::unique_ptr<Workspace> own(new Workspace);
    own->prepare(head_dim);
    return *own;
}

// Accumulator elements of two tiles of rows.
int64_t pair_elements(int64_t n_query_tiles) { return 2 * n_query_tiles * kAccumulatorElements; }

// accumulators (+)= w c, for two tiles of rows from tile i on.
void multiply_pair(const Halves& w, int64_t i, const Halves& c, int64_t n_query_tiles, int64_t depth,
                   float* accumulators, bool add) {
    const int64_t stride = depth * kTileElements;
    tile_gemm_split({w.high(i * stride), stride, c.high(0), stride, accumulators}, {w.n, c.n}, 2,
                    n_query_tiles, depth, add);
}

// Packs queries [begin, begin + n) of a KV head as activations; padding of the last tile repeats the last
// one.
TARGET_AVX512 void load_queries(Workspace& ws, const AttentionInputs& in, int64_t head, int64_t begin,
                                int64_t n, int64_t n_query_tiles) {
    const int64_t dim = ws.dim;
    for (int64_t tile = 0; tile < n_query_tiles; ++tile) {
        const float *rows[kTileRows], *residuals[kTileRows];
        for (int64_t i = 0; i < kTileRows; ++i) {
            const int64_t lane = tile * kTileRows + i, query = begin + std::min(lane, n - 1);
            rows[i] = in.query(head, query, ws.query_rows.get() + i * dim);
            float* residual = ws.residuals.get() + i * dim;
            for (int64_t d = 0; d < dim; ++d)
                residual[d] = rows[i][d] - pydiffusion::nearest_bfloat16(rows[i][d]);
            residuals[i] = residual;
            ws.maximum[lane] = kInitialMaximum;
            ws.sum[lane] = 0.0f;
            const Causal::Rows visible = in.visible(query);
            ws.first[lane] = visible.first;
            ws.last[lane] = visible.last;
        }
        pack_activations(rows, dim, ws.queries.high(tile * kTileRows * dim));
        pack_activations(residuals, dim, ws.queries.low(tile * kTileRows * dim));
    }
    std::fill_n(ws.output.get(), dim * n_query_tiles * kTileRows, 0.0f);
}

void load_keys(Workspace& ws, const AttentionInputs& in, int64_t head, int64_t row, int64_t n) {
    const int64_t dim = ws.dim, depth = dim / kTileDepth;
    in.load_rows(ws.rows.get(), in.k, head, row, n);
    for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t d = 0; d < depth; ++d) {
            const int64_t at = (r / kTileRows * depth + d) * kTileElements + r % kTileRows * kTileDepth;
            split(ws.rows.get() + r * dim + d * kTileDepth, r < n ? ~uint32_t{0} : 0, ws.keys.high(at),
                  ws.keys.low(at));
        }
    }
}

// Transposes: a tile row is one element of the head for 32 rows of the cache.
TARGET_AVX512 void load_values(Workspace& ws, const AttentionInputs& in, int64_t head, int64_t row,
                               int64_t n) {
    const int64_t dim = ws.dim;
    in.load_rows(ws.rows.get(), in.v, head, row, n);
    std::fill(ws.rows.get() + n * dim, ws.rows.get() + kRows * dim, 0.0f);
    for (int64_t d = 0; d < dim; d += kTileRows) {
        for (int64_t k = 0; k < kRowDepth; ++k) {
            alignas(64) float transposed[2][kAccumulatorElements];
            for (int64_t half = 0; half < 2; ++half) {
                const float* from = ws.rows.get() + (k * kTileDepth + half * kTileRows) * dim + d;
                float* targets[kTileRows];
                for (int64_t i = 0; i < kTileRows; ++i) targets[i] = transposed[half] + i * kTileRows;
                alignas(64) float tile[kAccumulatorElements];
                for (int64_t i = 0; i < kTileRows; ++i)
                    _mm512_store_ps(tile + i * kTileRows, _mm512_loadu_ps(from + i * dim));
                store_tile(tile, kTileRows, targets, kTileRows);
            }
            const int64_t tile_at = (d / kTileRows * kRowDepth + k) * kTileElements;
            for (int64_t i = 0; i < kTileRows; ++i) {
                alignas(64) float values[kTileDepth];
                _mm512_store_ps(values, _mm512_load_ps(transposed[0] + i * kTileRows));
                _mm512_store_ps(values + kTileRows, _mm512_load_ps(transposed[1] + i * kTileRows));
                const int64_t at = tile_at + i * kTileDepth;
                split(values, ~uint32_t{0}, ws.values.high(at), ws.values.low(at));
            }
        }
    }
}

// The scores of a tile of 16 queries with row r.
float* scores_of(Workspace& ws, int64_t query_tile, int64_t r, int64_t n_query_tiles) {
    return ws.scores.get() + r / (2 * kTileRows) * pair_elements(n_query_tiles) +
           (2 * query_tile + r / kTileRows % 2) * kAccumulatorElements + r % kTileRows * kTileRows;
}

TARGET_AVX512 inline __m512 nearest_bfloat16(__m512 x) {
    const __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// exp(x - maximum), at least 2^-126.
inline float exp_below(float x, float maximum) {
    const float exponent = (x - maximum) * static_cast<float>(kLog2E);
    return small_exp2(exponent > -126.0f ? exponent : -126.0f);
}

// Turns the scores of a tile of 16 queries into weights, and updates maximum, sum and the rescaling factor.
TARGET_AVX512 void softmax_tile(Workspace& ws, int64_t query_tile, int32_t row, int64_t n,
                                int64_t n_query_tiles) {
    const int64_t lane = query_tile * kTileRows;
    const int32_t *first = ws.first + lane, *last = ws.last + lane;
    float maximum[kTileRows], sum[kTileRows];
    std::copy_n(ws.maximum + lane, kTileRows, maximum);
    for (int64_t r = 0; r < n; ++r) {
        const float* s = scores_of(ws, query_tile, r, n_query_tiles);
        const int32_t at = row + static_cast<int32_t>(r);
        for (int64_t i = 0; i < kTileRows; ++i) {
            const bool visible = (at >= first[i]) & (at <= last[i]);
            const float candidate = visible ? s[i] : kInitialMaximum;
            maximum[i] = candidate > maximum[i] ? candidate : maximum[i];
        }
    }
    for (int64_t i = 0; i < kTileRows; ++i) {
        const float previous = ws.maximum[lane + i];
        ws.factor[lane + i] = previous == maximum[i] ? 1.0f : exp_below(previous, maximum[i]);
        ws.maximum[lane + i] = maximum[i];
        sum[i] = ws.sum[lane + i] * ws.factor[lane + i];
    }
    for (int64_t r = 0; r < kRows; r += 2) {
        alignas(64) float weights[2][kTileRows];
        for (int64_t odd = 0; odd < 2; ++odd) {
            const float* s = scores_of(ws, query_tile, r + odd, n_query_tiles);
            const int32_t at = row + static_cast<int32_t>(r + odd);
            const bool in_range = r + odd < n;
            for (int64_t i = 0; i < kTileRows; ++i) {
                // s - s propagates NaN, which exp_below does not.
                const float weight = exp_below(s[i], maximum[i]) + (s[i] - s[i]);
                const bool visible = in_range & (at >= first[i]) & (at <= last[i]);
                weights[odd][i] = visible ? weight : 0.0f;
                sum[i] += weights[odd][i];
            }
        }
        const __m512 even = _mm512_load_ps(weights[0]), odd = _mm512_load_ps(weights[1]);
        const int64_t offset = lane * kRows + r / 2 * kTileDepth;
        _mm512_storeu_si512(ws.weights.high(offset), pairs_of(even, odd));
        _mm512_storeu_si512(ws.weights.low(offset), pairs_of(_mm512_sub_ps(even, nearest_bfloat16(even)),
                                                             _mm512_sub_ps(odd, nearest_bfloat16(odd))));
    }
    std::copy_n(sum, kTileRows, ws.sum + lane);
}

// Rescales the running output to the new maxima.
TARGET_AVX512 void rescale(Workspace& ws, int64_t n_query_tiles) {
    for (int64_t tile = 0; tile < n_query_tiles; ++tile) {
        const __m512 factor = _mm512_load_ps(ws.factor + tile * kTileRows);
        if (_mm512_cmp_ps_mask(factor, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) == 0) continue;
        for (int64_t pair = 0; pair < ws.dim / (2 * kTileRows); ++pair) {
            float* o =
                ws.output.get() + pair * pair_elements(n_query_tiles) + 2 * tile * kAccumulatorElements;
            for (int64_t i = 0; i < 2 * kAccumulatorElements; i += kTileRows)
                _mm512_storeu_ps(o + i, _mm512_mul_ps(_mm512_loadu_ps(o + i), factor));
        }
    }
}

TARGET_AVX512 void store_output(Workspace& ws, const AttentionInputs& in, int64_t head, int64_t begin,
                                int64_t n, int64_t n_query_tiles) {
    for (int64_t tile = 0; tile < n_query_tiles; ++tile) {
        const int64_t lane = tile * kTileRows;
        const __m512 inverse_sum = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(ws.sum + lane));
        for (int64_t d = 0; d < ws.dim; d += kTileRows) {
            float* o = ws.output.get() + d / (2 * kTileRows) * pair_elements(n_query_tiles) +
                       (2 * tile + d / kTileRows % 2) * kAccumulatorElements;
            for (int64_t i = 0; i < kAccumulatorElements; i += kTileRows)
                _mm512_storeu_ps(o + i, _mm512_mul_ps(_mm512_loadu_ps(o + i), inverse_sum));
            float* targets[kTileRows];
            const int64_t n_valid = std::min(kTileRows, n - lane);
            for (int64_t i = 0; i < n_valid; ++i) targets[i] = in.output(head, begin + lane + i) + d;
            store_tile(o, kTileRows, targets, n_valid);
        }
    }
}

void attend_block(Workspace& ws, const AttentionInputs& in, int64_t head, int64_t begin, int64_t n) {
    const int64_t n_query_tiles = (n + kTileRows - 1) / kTileRows, depth = ws.dim / kTileDepth;
    load_queries(ws, in, head, begin, n, n_query_tiles);
    const int64_t first = *std::min_element(ws.first, ws.first + n) / kRows * kRows;
    const int64_t last = *std::max_element(ws.last, ws.last + n);
    for (int64_t row = first; row <= last; row += kRows) {
        const int64_t n_rows = std::min(kRows, in.n_rows() - row);
        load_keys(ws, in, head, row, n_rows);
        for (int64_t i = 0; i < kRowTiles; i += 2) {
            multiply_pair(ws.keys, i, ws.queries, n_query_tiles, depth,
                          ws.scores.get() + i / 2 * pair_elements(n_query_tiles), false);
        }
        for (int64_t tile = 0; tile < n_query_tiles; ++tile)
            softmax_tile(ws, tile, static_cast<int32_t>(row), n_rows, n_query_tiles);
        rescale(ws, n_query_tiles);
        load_values(ws, in, head, row, n_rows);
        for (int64_t i = 0; i < ws.dim / kTileRows; i += 2) {
            multiply_pair(ws.values, i, ws.weights, n_query_tiles, kRowDepth,
                          ws.output.get() + i / 2 * pair_elements(n_query_tiles), true);
        }
    }
    store_output(ws, in, head, begin, n, n_query_tiles);
}

}  // namespace

bool can_attend(ggml_type type, int64_t head_dim) {
    return type != GGML_TYPE_F32 && head_dim % kTileDepth == 0;
}

void attend_op(ggml_tensor* dst, int ith, int nth, void* userdata) {
    const AttentionInputs in(dst, userdata);
    const KernelScope scope(Kernel::amx);
    Workspace& ws = workspace_for(in.head_dim());
    const int64_t n = in.n_queries(), n_large_blocks = (n + kMaxBlock - 1) / kMaxBlock;
    // Large blocks pack K and V less often; smaller ones if there are too few tasks for all threads.
    const int64_t block = in.n_heads() * n_large_blocks >= 2 * n_threads_for(nth) ? kMaxBlock : kMinBlock;
    const int64_t n_blocks = (n + block - 1) / block;
    for (int64_t task = ith; task < in.n_heads() * n_blocks; task += nth) {
        const int64_t begin = task % n_blocks * block;
        attend_block(ws, in, task / n_blocks, begin, std::min(block, n - begin));
    }
}

#else

bool can_attend(ggml_type, int64_t) { return false; }
void attend_op(ggml_tensor*, int, int, void*) {}

#endif

}  // namespace gemm
}  // namespace pydiffusion
