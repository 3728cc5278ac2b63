#include "backend/cpu/bf16_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "backend/cpu/amx/intrinsics.h"
#include "backend/cpu/custom_node.h"
#include "util/aligned_buffer.h"
#include "util/simd_math.h"

namespace pydiffusion {
namespace gemm {

#if defined(PYDIFFUSION_AMX)

namespace {

// As in attention.cpp each lane is one query, scores = K Q^T, output = V^T weights, and a task is a head and
// a block of its queries, which reads the rows of K and V tile by tile. K and V are rounded and V transposed
// once, by a node of their own, for all blocks.
constexpr int kVectors = 3;                // of queries
constexpr int64_t kLanes = 16 * kVectors;  // queries of a block
constexpr int kRows = 8;                   // of K or V^T, multiplied at a time: 24 sums stay in registers
constexpr int64_t kTile = 256;             // rows of K and V
constexpr int64_t kMaxHead = 256;

// Rounded K [n_padded][dim] and V^T [dim][n_padded] of each head; rows from n on are zeros.
struct Packed {
    Packed(const ggml_tensor* node, int64_t n_tokens, int64_t head_dim)
        : data(align(static_cast<uint16_t*>(node->data))), n(n_tokens), dim(head_dim) {}

    uint16_t* data;
    int64_t n, dim;
    int64_t n_padded = padded(n);

    static int64_t padded(int64_t n) { return (n + kTile - 1) / kTile * kTile; }
    uint16_t* keys(int64_t head) const { return data + 2 * head * n_padded * dim; }
    uint16_t* values(int64_t head) const { return keys(head) + n_padded * dim; }
};

const float* head_row(const ggml_tensor* x, int64_t head, int64_t t) {
    return reinterpret_cast<const float*>(static_cast<const char*>(x->data) + head * x->nb[1] + t * x->nb[2]);
}

uint16_t rounded(float x) {
    const float nearest = nearest_bfloat16(x);
    uint32_t bits;
    __builtin_memcpy(&bits, &nearest, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
}

// Per-thread buffers.
struct Workspace {
    uint16_t values[kTile * kMaxHead];                // of V, before they are transposed
    alignas(64) uint16_t queries[kMaxHead * kLanes];  // [dim / 2][kLanes][2]
    alignas(64) uint16_t weights[kTile * kLanes];     // [kTile / 2][kLanes][2]
    alignas(64) float scores[kTile * kLanes];         // [kTile][kLanes]
    alignas(64) float output[kMaxHead * kLanes];      // [dim][kLanes]
    alignas(64) float maximum[kLanes], sum[kLanes], factor[kLanes];
};

Workspace& workspace() {
    static thread_local std::unique_ptr<Workspace> own(new Workspace);
    return *own;
}

// A tile of rows of one head.
void pack_tile(const Packed& packed, const ggml_tensor* k, const ggml_tensor* v, int64_t head,
               int64_t first) {
    const int64_t dim = packed.dim, n = std::min(kTile, packed.n - first);
    uint16_t* rows = workspace().values;
    uint16_t *keys = packed.keys(head) + first * dim, *values = packed.values(head) + first;
    std::fill(keys + n * dim, keys + kTile * dim, uint16_t{0});
    std::fill(rows + n * dim, rows + kTile * dim, uint16_t{0});
    for (int64_t r = 0; r < n; ++r) {
        const float *key = head_row(k, head, first + r), *value = head_row(v, head, first + r);
        for (int64_t d = 0; d < dim; ++d) keys[r * dim + d] = rounded(key[d]);
        for (int64_t d = 0; d < dim; ++d) rows[r * dim + d] = rounded(value[d]);
    }
    for (int64_t d = 0; d < dim; ++d) {
        for (int64_t r = 0; r < kTile; ++r) values[d * packed.n_padded + r] = rows[r * dim + d];
    }
}

void pack_op(ggml_tensor* dst, int ith, int nth, void*) {
    const ggml_tensor *k = dst->src[0], *v = dst->src[1];
    const Packed packed(dst, k->ne[2], k->ne[0]);
    const int64_t n_tiles = packed.n_padded / kTile, n_tasks = n_tiles * k->ne[1];
    for (int64_t task = n_tasks * ith / nth; task < n_tasks * (ith + 1) / nth; ++task)
        pack_tile(packed, k, v, task / n_tiles, task % n_tiles * kTile);
}

// sums [kRows][kLanes] = factor * sums + rows * lanes: rows of pairs `stride` elements apart, lanes
// [n_pairs][kLanes][2]. factor: null: 0.
TARGET_AVX512 inline void multiply_rows(const uint16_t* rows, int64_t stride, const uint16_t* lanes,
                                        int64_t n_pairs, const float* factor, float* sums) {
    __m512 s[kRows][kVectors];
    for (int v = 0; v < kVectors; ++v) {
        const __m512 f = factor ? _mm512_load_ps(factor + 16 * v) : _mm512_setzero_ps();
        for (int r = 0; r < kRows; ++r)
            s[r][v] = factor ? _mm512_mul_ps(f, _mm512_load_ps(sums + r * kLanes + 16 * v)) : f;
    }
    for (int64_t pair = 0; pair < n_pairs; ++pair, lanes += 2 * kLanes) {
        __m512bh c[kVectors];
        for (int v = 0; v < kVectors; ++v) c[v] = (__m512bh)_mm512_load_si512(lanes + 32 * v);
        for (int r = 0; r < kRows; ++r) {
            int32_t bits;
            __builtin_memcpy(&bits, rows + r * stride + 2 * pair, sizeof bits);
            const __m512bh row = (__m512bh)_mm512_set1_epi32(bits);
            for (int v = 0; v < kVectors; ++v) s[r][v] = _mm512_dpbf16_ps(s[r][v], row, c[v]);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) _mm512_store_ps(sums + r * kLanes + 16 * v, s[r][v]);
    }
}

// 2^z, 0 for z far below; relative error 4e-6, far less than the rounding to bfloat16.
TARGET_AVX512 inline __m512 power(__m512 z) {
    const __m512 n = _mm512_roundscale_ps(z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(z, n);  // -0.5 to 0.5; the polynomial was fitted at Chebyshev nodes
    __m512 p = _mm512_set1_ps(9.66637e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.592198e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022349e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9312105e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// Turns the scores of n rows into weights, up to n_computed rows with zeros, and updates maximum, sum and the
// factor of earlier weights.
TARGET_AVX512 void softmax(Workspace& ws, int64_t n, int64_t n_computed) {
    const __m512 log2e = _mm512_set1_ps(1.44269504f);
    for (int64_t lane = 0; lane < kLanes; lane += 16) {
        const float* scores = ws.scores + lane;
        const __m512 before = _mm512_load_ps(ws.maximum + lane);
        __m512 maximum = before;
        for (int64_t r = 0; r < n; ++r) maximum = _mm512_max_ps(_mm512_load_ps(scores + r * kLanes), maximum);
        const __m512 shift = _mm512_mul_ps(maximum, log2e);
        const __m512 factor = power(_mm512_fmsub_ps(before, log2e, shift));
        __m512 sums[2] = {_mm512_mul_ps(_mm512_load_ps(ws.sum + lane), factor), _mm512_setzero_ps()};
        for (int64_t r = 0; r < n_computed; r += 2) {
            __m512 weights[2];
            for (int odd = 0; odd < 2; ++odd) {
                const __m512 score = _mm512_load_ps(scores + (r + odd) * kLanes);
                weights[odd] =
                    r + odd < n ? power(_mm512_fmsub_ps(score, log2e, shift)) : _mm512_setzero_ps();
                sums[odd] = _mm512_add_ps(sums[odd], weights[odd]);
            }
            _mm512_store_si512(ws.weights + r * kLanes + 2 * lane, pairs_of(weights[0], weights[1]));
        }
        _mm512_store_ps(ws.maximum + lane, maximum);
        _mm512_store_ps(ws.sum + lane, _mm512_add_ps(sums[0], sums[1]));
        _mm512_store_ps(ws.factor + lane, factor);
    }
}

// Queries [begin, begin + kLanes) of a head; lanes behind the last token repeat it, and are not stored.
void load_queries(Workspace& ws, const ggml_tensor* q, int64_t head, int64_t begin) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
        const float* query = head_row(q, head, std::min(begin + lane, q->ne[2] - 1));
        for (int64_t d = 0; d < q->ne[0]; ++d)
            ws.queries[d / 2 * 2 * kLanes + 2 * lane + d % 2] = rounded(query[d]);
        ws.maximum[lane] = -1e30f;
        ws.sum[lane] = 0.0f;
    }
    std::fill_n(ws.output, q->ne[0] * kLanes, 0.0f);
}

void attend_block(Workspace& ws, const Packed& packed, const ggml_tensor* q, int64_t head, int64_t begin) {
    const int64_t dim = packed.dim;
    load_queries(ws, q, head, begin);
    for (int64_t first = 0; first < packed.n; first += kTile) {
        const int64_t n = std::min(kTile, packed.n - first), n_computed = (n + kRows - 1) / kRows * kRows;
        for (int64_t r = 0; r < n_computed; r += kRows)
            multiply_rows(packed.keys(head) + (first + r) * dim, dim, ws.queries, dim / 2, nullptr,
                          ws.scores + r * kLanes);
        softmax(ws, n, n_computed);
        for (int64_t d = 0; d < dim; d += kRows)
            multiply_rows(packed.values(head) + d * packed.n_padded + first, packed.n_padded, ws.weights,
                          n_computed / 2, ws.factor, ws.output + d * kLanes);
    }
}

// Sources: the packed node and Q.
void attend_op(ggml_tensor* dst, int ith, int nth, void*) {
    const ggml_tensor* q = dst->src[1];
    const int64_t dim = q->ne[0], n = q->ne[2];
    const Packed packed(dst->src[0], n, dim);
    const int64_t n_blocks = (n + kLanes - 1) / kLanes, n_tasks = n_blocks * q->ne[1];
    Workspace& ws = workspace();
    // In order of heads, whose K and V stay in the cache.
    for (int64_t task = n_tasks * ith / nth; task < n_tasks * (ith + 1) / nth; ++task) {
        const int64_t head = task / n_blocks, begin = task % n_blocks * kLanes;
        attend_block(ws, packed, q, head, begin);
        for (int64_t lane = 0; lane < std::min(kLanes, n - begin); ++lane) {
            auto* out = reinterpret_cast<float*>(static_cast<char*>(dst->data) + (begin + lane) * dst->nb[1]);
            const float scale = 1.0f / ws.sum[lane];
            for (int64_t d = 0; d < dim; ++d) out[head * dim + d] = ws.output[d * kLanes + lane] * scale;
        }
    }
}

}  // namespace

bool can_attend_all(const ggml_tensor* q) { return q->ne[0] % kRows == 0 && q->ne[0] <= kMaxHead; }

ggml_tensor* attend_all(ggml_context* ctx, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) {
    const int64_t dim = q->ne[0], n_head = q->ne[1], n = q->ne[2];
    constexpr int64_t alignment_padding = kCacheLine / sizeof(uint16_t);
    ggml_tensor* sources[] = {k, v};
    ggml_tensor* packed =
        ggml_custom_4d(ctx, GGML_TYPE_BF16, 2 * Packed::padded(n) * dim * n_head + alignment_padding, 1, 1, 1,
                       sources, 2, pack_op, GGML_N_TASKS_MAX, nullptr);
    ggml_set_name(packed, "pack_heads");
    ggml_tensor* operands[] = {packed, q};
    ggml_tensor* out = ggml_custom_4d(ctx, GGML_TYPE_F32, dim * n_head, n, 1, 1, operands, 2, attend_op,
                                      GGML_N_TASKS_MAX, nullptr);
    return ggml_set_name(out, "attend_all");
}

#else

bool can_attend_all(const ggml_tensor*) { return false; }
ggml_tensor* attend_all(ggml_context*, ggml_tensor*, ggml_tensor*, ggml_tensor*) { return nullptr; }

#endif

}  // namespace gemm
}  // namespace pydiffusion
