#include "backend/cpu/amx/tile_gemm.h"

#if defined(PYDIFFUSION_AMX)
#include <immintrin.h>
#endif

namespace pydiffusion {
namespace gemm {

namespace {

#if defined(PYDIFFUSION_AMX)

// --- AMX ---

// Eight tiles of 16 rows of 64 bytes. Static, because compilers don't know how much of it LDTILECFG reads.
struct alignas(64) TileConfiguration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
const TileConfiguration kEightTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Compilers don't know what tile loads and stores access either.
inline void compiler_barrier() { asm volatile("" ::: "memory"); }

PYDIFFUSION_TARGET_AMX void configure_tiles() { _tile_loadconfig(&kEightTiles); }

PYDIFFUSION_TARGET_AMX void release_tiles() { _tile_release(); }

constexpr int64_t kActivationTilesInL1 = 4;  // about

// Tile registers: 0 to 3 accumulators, 4 and 5 weights, 6 and 7 activations.
constexpr int kRowBytes = 64;

template <int W>
PYDIFFUSION_TARGET_AMX inline void load_weights(const uint16_t* w, int64_t stride) {
    _tile_loadd(4, w, kRowBytes);
    if constexpr (W > 1) _tile_loadd(5, w + stride, kRowBytes);
}

template <int C>
PYDIFFUSION_TARGET_AMX inline void load_activations(const uint16_t* c, int64_t stride) {
    _tile_loadd(6, c, kRowBytes);
    if constexpr (C > 1) _tile_loadd(7, c + stride, kRowBytes);
}

// Weights are in L1, but many activations only in L2: prefetches their next tiles.
template <int C>
PYDIFFUSION_TARGET_AMX inline void prefetch_activations(const uint16_t* c, int64_t stride) {
    for (int64_t i = 0; i < kTileElements; i += kRowBytes / 2) {
        _mm_prefetch(c + i, _MM_HINT_T0);
        if constexpr (C > 1) _mm_prefetch(c + stride + i, _MM_HINT_T0);
    }
}

template <int W, int C>
PYDIFFUSION_TARGET_AMX inline void accumulate() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (W > 1) _tile_dpbf16ps(1, 5, 6);
    if constexpr (C > 1) _tile_dpbf16ps(2, 4, 7);
    if constexpr (W > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
}

template <int W, int C>
PYDIFFUSION_TARGET_AMX void multiply_tiles(const TileOperands& o, const LowHalves& low, int64_t depth,
                                           bool add, bool prefetch) {
    float* p = o.accumulators;
    compiler_barrier();
    if (add) {
        _tile_loadd(0, p, kRowBytes);
        if constexpr (W > 1) _tile_loadd(1, p + kAccumulatorElements, kRowBytes);
        if constexpr (C > 1) _tile_loadd(2, p + 2 * kAccumulatorElements, kRowBytes);
        if constexpr (W > 1 && C > 1) _tile_loadd(3, p + 3 * kAccumulatorElements, kRowBytes);
    } else {
        _tile_zero(0);
        if constexpr (W > 1) _tile_zero(1);
        if constexpr (C > 1) _tile_zero(2);
        if constexpr (W > 1 && C > 1) _tile_zero(3);
    }
    const uint16_t *w = o.weights, *c = o.activations;
    for (int64_t i = 0; i < depth; ++i, w += kTileElements, c += kTileElements) {
        if (prefetch) prefetch_activations<C>(c + kTileElements, o.activation_stride);
        load_activations<C>(c, o.activation_stride);
        if (low.weights) {
            load_weights<W>(w + low.weights, o.weight_stride);
            accumulate<W, C>();
        }
        load_weights<W>(w, o.weight_stride);
        accumulate<W, C>();
        if (low.activations) {
            load_activations<C>(c + low.activations, o.activation_stride);
            accumulate<W, C>();
        }
    }
    _tile_stored(0, p, kRowBytes);
    if constexpr (W > 1) _tile_stored(1, p + kAccumulatorElements, kRowBytes);
    if constexpr (C > 1) _tile_stored(2, p + 2 * kAccumulatorElements, kRowBytes);
    if constexpr (W > 1 && C > 1) _tile_stored(3, p + 3 * kAccumulatorElements, kRowBytes);
    compiler_barrier();
}

// --- AVX-512 BF16 ---

// Half the rows of a weight tile at a time, for C tiles of activations: 8 C sums stay in registers.
template <int C>
PYDIFFUSION_TARGET_AVX512 void multiply_vectors(const TileOperands& o, int64_t i_weights, int64_t depth,
                                                bool add) {
    constexpr int R = 8;
    for (int64_t first = 0; first < kTileRows; first += R) {
        float* p = o.accumulators + i_weights * kAccumulatorElements + first * kTileRows;
        __m512 sums[C][R];
        for (int j = 0; j < C; ++j) {
            for (int r = 0; r < R; ++r) {
                sums[j][r] = add ? _mm512_loadu_ps(p + 2 * j * kAccumulatorElements + r * kTileRows)
                                 : _mm512_setzero_ps();
            }
        }
        for (int64_t d = 0; d < depth; ++d) {
            const uint16_t* w =
                o.weights + i_weights * o.weight_stride + d * kTileElements + first * kTileDepth;
            const uint16_t* c = o.activations + d * kTileElements;
            for (int64_t pair = 0; pair < kTileDepth / 2; ++pair) {
                __m512bh activations[C];
                for (int j = 0; j < C; ++j)
                    activations[j] =
                        (__m512bh)_mm512_loadu_si512(c + j * o.activation_stride + pair * kTileDepth);
                for (int r = 0; r < R; ++r) {
                    int32_t bits;
                    __builtin_memcpy(&bits, w + r * kTileDepth + 2 * pair, sizeof bits);
                    const __m512bh weight = (__m512bh)_mm512_set1_epi32(bits);
                    for (int j = 0; j < C; ++j)
                        sums[j][r] = _mm512_dpbf16_ps(sums[j][r], weight, activations[j]);
                }
            }
        }
        for (int j = 0; j < C; ++j) {
            for (int r = 0; r < R; ++r)
                _mm512_storeu_ps(p + 2 * j * kAccumulatorElements + r * kTileRows, sums[j][r]);
        }
    }
}

#endif

}  // namespace

KernelScope::KernelScope(Kernel kernel) : kernel_(kernel) {
#if defined(PYDIFFUSION_AMX)
    if (kernel_ == Kernel::amx) configure_tiles();
#endif
}

KernelScope::~KernelScope() {
#if defined(PYDIFFUSION_AMX)
    if (kernel_ == Kernel::amx) release_tiles();
#endif
}

#if defined(PYDIFFUSION_AMX)

void tile_gemm(Kernel kernel, const TileOperands& operands, int64_t n_weights, int64_t n_activations,
               int64_t depth, bool add) {
    if (kernel == Kernel::amx) {
        tile_gemm_split(operands, {0, 0}, n_weights, n_activations, depth, add);
        return;
    }
    for (int64_t j = 0; j < n_activations; j += 2) {
        TileOperands o = operands;
        o.activations += j * o.activation_stride;
        o.accumulators += 2 * j * kAccumulatorElements;
        for (int64_t i = 0; i < n_weights; ++i)
            (j + 1 < n_activations ? multiply_vectors<2> : multiply_vectors<1>)(o, i, depth, add);
    }
}

void tile_gemm_split(const TileOperands& operands, const LowHalves& low, int64_t n_weights,
                     int64_t n_activations, int64_t depth, bool add) {
    for (int64_t j = 0; j < n_activations; j += 2) {
        TileOperands o = operands;
        o.activations += j * o.activation_stride;
        o.accumulators += 2 * j * kAccumulatorElements;
        const bool pair = j + 1 < n_activations;
        const auto f = n_weights > 1 ? (pair ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                                     : (pair ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
        f(o, low, depth, add, n_activations > kActivationTilesInL1);
    }
}

#else

void tile_gemm(Kernel, const TileOperands&, int64_t, int64_t, int64_t, bool) {}
void tile_gemm_split(const TileOperands&, const LowHalves&, int64_t, int64_t, int64_t, bool) {}

#endif

}  // namespace gemm
}  // namespace pydiffusion
