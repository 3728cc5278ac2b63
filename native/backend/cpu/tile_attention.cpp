#include "backend/cpu/tile_attention.h"

#include <memory>

#include "backend/cpu/amx/intrinsics.h"
#include "backend/cpu/amx/pack.h"
#include "backend/cpu/attention_inputs.h"
#include "util/aligned_buffer.h"
#include "util/simd_math.h"

namespace pydiffusion {
namespace gemm {

#if defined(PYDIFFUSION_TILES)

namespace {

// As in attention.cpp queries are lanes: scores are keys times queries, the output values (turned over) times
// weights, and a task is one key head and a block of its queries, which goes through the rows tile by tile.
constexpr int64_t kRows = kAttentionTile;  // of keys and values, at a time
constexpr int64_t kMaxBlock = 256;         // queries
constexpr int64_t kMinBlock = 128;
constexpr int64_t kRowTiles = kRows / kTileRows, kRowDepth = kRows / kTileDepth;

// Numbers in tiles: the high halves, then the low ones.
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

// What a thread works in. Matmul lie as multiply() makes them, for two tiles of rows (or of a head's
// numbers) at a time.
struct Area {
    int64_t dim = 0;
    AlignedBuffer<float> rows;    // [kRows][dim], of keys, then of values
    AlignedBuffer<float> made;    // [kTileRows][dim], queries
    AlignedBuffer<float> rest;    // [kTileRows][dim], what the high halves leave of them
    Halves queries;               // columns: [lane tile][dim / 32]
    Halves keys;                  // rows: [row tile][dim / 32]
    Halves values;                // rows are the head's numbers: [dim / 16][kRowDepth]
    Halves weights;               // columns: [lane tile][kRowDepth]
    AlignedBuffer<float> scores;  // [kRows / 32] products
    AlignedBuffer<float> output;  // [dim / 32] products
    alignas(64) float maximum[kMaxBlock], sum[kMaxBlock], factor[kMaxBlock];
    alignas(64) int32_t first[kMaxBlock], last[kMaxBlock];

    void prepare(int64_t head_dim) {
        if (dim == head_dim) return;
        dim = head_dim;
        rows = allocate<float>(kRows * dim);
        made = allocate<float>(kTileRows * dim);
        rest = allocate<float>(kTileRows * dim);
        queries.resize(kMaxBlock * dim);
        keys.resize(kRows * dim);
        values.resize(kRows * dim);
        weights.resize(kRows * kMaxBlock);
        scores = allocate<float>(kRows * kMaxBlock);
        output = allocate<float>(dim * kMaxBlock);
    }
};

Area& area_for(int64_t head_dim) {
    static thread_local std::unique_ptr<Area> own(new Area);
    own->prepare(head_dim);
    return *own;
}

// The number of floats of the products that belong to two tiles of rows.
int64_t pair_numbers(int64_t n_lane_tiles) { return 2 * n_lane_tiles * kAccumulatorElements; }

// products (+)= w c, for two tiles of rows from tile i on.
void multiply_pair(const Halves& w, int64_t i, const Halves& c, int64_t n_lane_tiles, int64_t depth,
                   float* products, bool add) {
    const int64_t stride = depth * kTileElements;
    tile_gemm_split({w.high(i * stride), stride, c.high(0), stride, products}, {w.n, c.n}, 2, n_lane_tiles,
                    depth, add);
}

// Queries [begin, begin + n) of a key head as columns; what is left of the last tile repeats the last one.
VECTORS void load_queries(Area& area, const AttentionInputs& in, int64_t head, int64_t begin, int64_t n,
                          int64_t n_lane_tiles) {
    const int64_t dim = area.dim;
    for (int64_t tile = 0; tile < n_lane_tiles; ++tile) {
        const float *whole[kTileRows], *rest[kTileRows];
        for (int64_t i = 0; i < kTileRows; ++i) {
            const int64_t lane = tile * kTileRows + i, query = begin + std::min(lane, n - 1);
            whole[i] = in.query(head, query, area.made.get() + i * dim);
            float* left = area.rest.get() + i * dim;
            for (int64_t d = 0; d < dim; ++d)
                left[d] = whole[i][d] - pydiffusion::nearest_bfloat16(whole[i][d]);
            rest[i] = left;
            area.maximum[lane] = kNoMaximum;
            area.sum[lane] = 0.0f;
            area.first[lane] = in.first(query);
            area.last[lane] = in.last(query);
        }
        pack_activations(whole, dim, area.queries.high(tile * kTileRows * dim));
        pack_activations(rest, dim, area.queries.low(tile * kTileRows * dim));
    }
    std::fill_n(area.output.get(), dim * n_lane_tiles * kTileRows, 0.0f);
}

void load_keys(Area& area, const AttentionInputs& in, int64_t head, int64_t row, int64_t n) {
    const int64_t dim = area.dim, depth = dim / kTileDepth;
    in.load_rows(area.rows.get(), in.k, head, row, n);
    for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t d = 0; d < depth; ++d) {
            const int64_t at = (r / kTileRows * depth + d) * kTileElements + r % kTileRows * kTileDepth;
            split(area.rows.get() + r * dim + d * kTileDepth, r < n ? ~uint32_t{0} : 0, area.keys.high(at),
                  area.keys.low(at));
        }
    }
}

// Turned over: a row of a tile is one number of the head for 32 rows of the cache.
VECTORS void load_values(Area& area, const AttentionInputs& in, int64_t head, int64_t row, int64_t n) {
    const int64_t dim = area.dim;
    in.load_rows(area.rows.get(), in.v, head, row, n);
    std::fill(area.rows.get() + n * dim, area.rows.get() + kRows * dim, 0.0f);
    for (int64_t d = 0; d < dim; d += kTileRows) {
        for (int64_t k = 0; k < kRowDepth; ++k) {
            alignas(64) float turned[2][kAccumulatorElements];
            for (int64_t half = 0; half < 2; ++half) {
                const float* from = area.rows.get() + (k * kTileDepth + half * kTileRows) * dim + d;
                float* targets[kTileRows];
                for (int64_t i = 0; i < kTileRows; ++i) targets[i] = turned[half] + i * kTileRows;
                alignas(64) float tile[kAccumulatorElements];
                for (int64_t i = 0; i < kTileRows; ++i)
                    _mm512_store_ps(tile + i * kTileRows, _mm512_loadu_ps(from + i * dim));
                store_tile(tile, kTileRows, targets, kTileRows);
            }
            const int64_t tile_at = (d / kTileRows * kRowDepth + k) * kTileElements;
            for (int64_t i = 0; i < kTileRows; ++i) {
                alignas(64) float numbers[kTileDepth];
                _mm512_store_ps(numbers, _mm512_load_ps(turned[0] + i * kTileRows));
                _mm512_store_ps(numbers + kTileRows, _mm512_load_ps(turned[1] + i * kTileRows));
                const int64_t at = tile_at + i * kTileDepth;
                split(numbers, ~uint32_t{0}, area.values.high(at), area.values.low(at));
            }
        }
    }
}

// The scores of 16 queries: 16 of row r.
float* scores_of(Area& area, int64_t lane_tile, int64_t r, int64_t n_lane_tiles) {
    return area.scores.get() + r / (2 * kTileRows) * pair_numbers(n_lane_tiles) +
           (2 * lane_tile + r / kTileRows % 2) * kAccumulatorElements + r % kTileRows * kTileRows;
}

// Two rows of 16 numbers as pairs.
VECTORS inline __m512i pairs_of(__m512 even, __m512 odd) {
    alignas(64) static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                   21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                   11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

VECTORS inline __m512 nearest_bfloat16(__m512 x) {
    const __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// exp(x - maximum); below 2^-126 as that.
inline float exp_below(float x, float maximum) {
    const float exponent = (x - maximum) * static_cast<float>(kLog2E);
    return small_exp2(exponent > -126.0f ? exponent : -126.0f);
}

// Scores of a tile of 16 queries become weights; maximum, sum and the factor of what went before follow.
VECTORS void softmax_lanes(Area& area, int64_t lane_tile, int32_t row, int64_t n, int64_t n_lane_tiles) {
    const int64_t lane = lane_tile * kTileRows;
    const int32_t *first = area.first + lane, *last = area.last + lane;
    float maximum[kTileRows], sum[kTileRows];
    std::copy_n(area.maximum + lane, kTileRows, maximum);
    for (int64_t r = 0; r < n; ++r) {
        const float* s = scores_of(area, lane_tile, r, n_lane_tiles);
        const int32_t at = row + static_cast<int32_t>(r);
        for (int64_t i = 0; i < kTileRows; ++i) {
            const bool seen = (at >= first[i]) & (at <= last[i]);
            const float candidate = seen ? s[i] : kNoMaximum;
            maximum[i] = candidate > maximum[i] ? candidate : maximum[i];
        }
    }
    for (int64_t i = 0; i < kTileRows; ++i) {
        const float before = area.maximum[lane + i];
        area.factor[lane + i] = before == maximum[i] ? 1.0f : exp_below(before, maximum[i]);
        area.maximum[lane + i] = maximum[i];
        sum[i] = area.sum[lane + i] * area.factor[lane + i];
    }
    for (int64_t r = 0; r < kRows; r += 2) {
        alignas(64) float weights[2][kTileRows];
        for (int64_t odd = 0; odd < 2; ++odd) {
            const float* s = scores_of(area, lane_tile, r + odd, n_lane_tiles);
            const int32_t at = row + static_cast<int32_t>(r + odd);
            const bool exists = r + odd < n;
            for (int64_t i = 0; i < kTileRows; ++i) {
                // s - s: exp_below alone would make a number of a NaN.
                const float weight = exp_below(s[i], maximum[i]) + (s[i] - s[i]);
                const bool seen = exists & (at >= first[i]) & (at <= last[i]);
                weights[odd][i] = seen ? weight : 0.0f;
                sum[i] += weights[odd][i];
            }
        }
        const __m512 even = _mm512_load_ps(weights[0]), odd = _mm512_load_ps(weights[1]);
        const int64_t place = lane * kRows + r / 2 * kTileDepth;
        _mm512_storeu_si512(area.weights.high(place), pairs_of(even, odd));
        _mm512_storeu_si512(area.weights.low(place), pairs_of(_mm512_sub_ps(even, nearest_bfloat16(even)),
                                                              _mm512_sub_ps(odd, nearest_bfloat16(odd))));
    }
    std::copy_n(sum, kTileRows, area.sum + lane);
}

// Brings the output so far to the new maxima.
VECTORS void rescale(Area& area, int64_t n_lane_tiles) {
    for (int64_t tile = 0; tile < n_lane_tiles; ++tile) {
        const __m512 factor = _mm512_load_ps(area.factor + tile * kTileRows);
        if (_mm512_cmp_ps_mask(factor, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) == 0) continue;
        for (int64_t pair = 0; pair < area.dim / (2 * kTileRows); ++pair) {
            float* o =
                area.output.get() + pair * pair_numbers(n_lane_tiles) + 2 * tile * kAccumulatorElements;
            for (int64_t i = 0; i < 2 * kAccumulatorElements; i += kTileRows)
                _mm512_storeu_ps(o + i, _mm512_mul_ps(_mm512_loadu_ps(o + i), factor));
        }
    }
}

VECTORS void store_output(Area& area, const AttentionInputs& in, int64_t head, int64_t begin, int64_t n,
                          int64_t n_lane_tiles) {
    for (int64_t tile = 0; tile < n_lane_tiles; ++tile) {
        const int64_t lane = tile * kTileRows;
        const __m512 share = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(area.sum + lane));
        for (int64_t d = 0; d < area.dim; d += kTileRows) {
            float* o = area.output.get() + d / (2 * kTileRows) * pair_numbers(n_lane_tiles) +
                       (2 * tile + d / kTileRows % 2) * kAccumulatorElements;
            for (int64_t i = 0; i < kAccumulatorElements; i += kTileRows)
                _mm512_storeu_ps(o + i, _mm512_mul_ps(_mm512_loadu_ps(o + i), share));
            float* targets[kTileRows];
            const int64_t n_lanes = std::min(kTileRows, n - lane);
            for (int64_t i = 0; i < n_lanes; ++i) targets[i] = in.output(head, begin + lane + i) + d;
            store_tile(o, kTileRows, targets, n_lanes);
        }
    }
}

void attend_block(Area& area, const AttentionInputs& in, int64_t head, int64_t begin, int64_t n) {
    const int64_t n_lane_tiles = (n + kTileRows - 1) / kTileRows, depth = area.dim / kTileDepth;
    load_queries(area, in, head, begin, n, n_lane_tiles);
    const int64_t first = *std::min_element(area.first, area.first + n) / kRows * kRows;
    const int64_t last = *std::max_element(area.last, area.last + n);
    for (int64_t row = first; row <= last; row += kRows) {
        const int64_t n_rows = std::min(kRows, in.n_rows() - row);
        load_keys(area, in, head, row, n_rows);
        for (int64_t i = 0; i < kRowTiles; i += 2) {
            multiply_pair(area.keys, i, area.queries, n_lane_tiles, depth,
                          area.scores.get() + i / 2 * pair_numbers(n_lane_tiles), false);
        }
        for (int64_t tile = 0; tile < n_lane_tiles; ++tile)
            softmax_lanes(area, tile, static_cast<int32_t>(row), n_rows, n_lane_tiles);
        rescale(area, n_lane_tiles);
        load_values(area, in, head, row, n_rows);
        for (int64_t i = 0; i < area.dim / kTileRows; i += 2) {
            multiply_pair(area.values, i, area.weights, n_lane_tiles, kRowDepth,
                          area.output.get() + i / 2 * pair_numbers(n_lane_tiles), true);
        }
    }
    store_output(area, in, head, begin, n, n_lane_tiles);
}

}  // namespace

bool can_attend(ggml_type type, int64_t head_dim) {
    return type != GGML_TYPE_F32 && head_dim % kTileDepth == 0;
}

void attend_op(ggml_tensor* dst, int ith, int nth, void* userdata) {
    const AttentionInputs in(dst, userdata);
    const KernelScope ready(Kernel::amx);
    Area& area = area_for(in.head_dim());
    const int64_t n = in.n_queries(), n_large = (n + kMaxBlock - 1) / kMaxBlock;
    // Large blocks make tiles of keys and values less often; smaller ones where there is too little to share
    // out.
    const int64_t block = in.n_heads() * n_large >= 2 * nth ? kMaxBlock : kMinBlock;
    const int64_t n_blocks = (n + block - 1) / block;
    for (int64_t task = ith; task < in.n_heads() * n_blocks; task += nth) {
        const int64_t begin = task % n_blocks * block;
        attend_block(area, in, task / n_blocks, begin, std::min(block, n - begin));
    }
}

#else

bool can_attend(ggml_type, int64_t) { return false; }
void attend_op(ggml_tensor*, int, int, void*) {}

#endif

}  // namespace gemm
}  // namespace pydiffusion
