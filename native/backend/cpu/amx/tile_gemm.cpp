#include "backend/cpu/amx/tile_gemm.h"

#include <algorithm>

#include "util/error.h"

#if defined(PYDIFFUSION_TILES)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pydiffusion {
namespace matrix {

namespace {

#if defined(PYDIFFUSION_TILES)

bool has_vectors() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return false;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// A process has to ask Linux for the tiles' state before its first use of them (Documentation/arch/x86/xstate
// of the kernel).
bool has_tiles() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_vectors() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool in_hardware = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
    return in_hardware && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// --- AMX ---

// Eight tiles of 16 rows of 64 bytes. Constant, because compilers don't know how much of it is read.
struct alignas(64) TileConfiguration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
const TileConfiguration kEightTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Nor do they know what tiles load and store.
inline void finish_memory_accesses() { asm volatile("" ::: "memory"); }

PYDIFFUSION_TILES_TARGET void configure_tiles() { _tile_loadconfig(&kEightTiles); }

PYDIFFUSION_TILES_TARGET void release_tiles() { _tile_release(); }

constexpr int64_t kColumnsInFirstCache = 4;  // tiles, about

// Tiles 0 to 3 are the products, 4 and 5 the weights, 6 and 7 the columns.
constexpr int kRowBytes = 64;

template <int W>
PYDIFFUSION_TILES_TARGET inline void load_weights(const uint16_t* w, int64_t stride) {
    _tile_loadd(4, w, kRowBytes);
    if constexpr (W > 1) _tile_loadd(5, w + stride, kRowBytes);
}

template <int C>
PYDIFFUSION_TILES_TARGET inline void load_columns(const uint16_t* c, int64_t stride) {
    _tile_loadd(6, c, kRowBytes);
    if constexpr (C > 1) _tile_loadd(7, c + stride, kRowBytes);
}

// Weights are in the first cache, and many columns in the second: the next tiles of those are asked for.
template <int C>
PYDIFFUSION_TILES_TARGET inline void fetch_columns(const uint16_t* c, int64_t stride) {
    for (int64_t i = 0; i < kTileNumbers; i += kRowBytes / 2) {
        _mm_prefetch(c + i, _MM_HINT_T0);
        if constexpr (C > 1) _mm_prefetch(c + stride + i, _MM_HINT_T0);
    }
}

template <int W, int C>
PYDIFFUSION_TILES_TARGET inline void add_products() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (W > 1) _tile_dpbf16ps(1, 5, 6);
    if constexpr (C > 1) _tile_dpbf16ps(2, 4, 7);
    if constexpr (W > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
}

template <int W, int C>
PYDIFFUSION_TILES_TARGET void multiply_tiles(const Operands& o, const LowHalves& low, int64_t depth, bool add,
                                             bool fetch) {
    float* p = o.products;
    finish_memory_accesses();
    if (add) {
        _tile_loadd(0, p, kRowBytes);
        if constexpr (W > 1) _tile_loadd(1, p + kProductNumbers, kRowBytes);
        if constexpr (C > 1) _tile_loadd(2, p + 2 * kProductNumbers, kRowBytes);
        if constexpr (W > 1 && C > 1) _tile_loadd(3, p + 3 * kProductNumbers, kRowBytes);
    } else {
        _tile_zero(0);
        if constexpr (W > 1) _tile_zero(1);
        if constexpr (C > 1) _tile_zero(2);
        if constexpr (W > 1 && C > 1) _tile_zero(3);
    }
    const uint16_t *w = o.weights, *c = o.columns;
    for (int64_t i = 0; i < depth; ++i, w += kTileNumbers, c += kTileNumbers) {
        if (fetch) fetch_columns<C>(c + kTileNumbers, o.column_stride);
        load_columns<C>(c, o.column_stride);
        if (low.weights) {
            load_weights<W>(w + low.weights, o.weight_stride);
            add_products<W, C>();
        }
        load_weights<W>(w, o.weight_stride);
        add_products<W, C>();
        if (low.columns) {
            load_columns<C>(c + low.columns, o.column_stride);
            add_products<W, C>();
        }
    }
    _tile_stored(0, p, kRowBytes);
    if constexpr (W > 1) _tile_stored(1, p + kProductNumbers, kRowBytes);
    if constexpr (C > 1) _tile_stored(2, p + 2 * kProductNumbers, kRowBytes);
    if constexpr (W > 1 && C > 1) _tile_stored(3, p + 3 * kProductNumbers, kRowBytes);
    finish_memory_accesses();
}

// --- AVX-512 BF16 ---

// Half of the rows of a tile of weights at a time, for C tiles of columns: 8 C sums stay in registers.
template <int C>
PYDIFFUSION_VECTORS_TARGET void multiply_vectors(const Operands& o, int64_t i_weights, int64_t depth,
                                                 bool add) {
    constexpr int R = 8;
    for (int64_t first = 0; first < kTileRows; first += R) {
        float* p = o.products + i_weights * kProductNumbers + first * kTileRows;
        __m512 sums[C][R];
        for (int j = 0; j < C; ++j) {
            for (int r = 0; r < R; ++r) {
                sums[j][r] =
                    add ? _mm512_loadu_ps(p + 2 * j * kProductNumbers + r * kTileRows) : _mm512_setzero_ps();
            }
        }
        for (int64_t d = 0; d < depth; ++d) {
            const uint16_t* w =
                o.weights + i_weights * o.weight_stride + d * kTileNumbers + first * kTileDepth;
            const uint16_t* c = o.columns + d * kTileNumbers;
            for (int64_t pair = 0; pair < kTileDepth / 2; ++pair) {
                __m512bh columns[C];
                for (int j = 0; j < C; ++j)
                    columns[j] = (__m512bh)_mm512_loadu_si512(c + j * o.column_stride + pair * kTileDepth);
                for (int r = 0; r < R; ++r) {
                    int32_t two;
                    __builtin_memcpy(&two, w + r * kTileDepth + 2 * pair, sizeof two);
                    const __m512bh weight = (__m512bh)_mm512_set1_epi32(two);
                    for (int j = 0; j < C; ++j) sums[j][r] = _mm512_dpbf16_ps(sums[j][r], weight, columns[j]);
                }
            }
        }
        for (int j = 0; j < C; ++j) {
            for (int r = 0; r < R; ++r)
                _mm512_storeu_ps(p + 2 * j * kProductNumbers + r * kTileRows, sums[j][r]);
        }
    }
}

#else

bool has_vectors() { return false; }
bool has_tiles() { return false; }

#endif

}  // namespace

namespace {

constexpr Kernel kKernels[] = {Kernel::ggml, Kernel::vectors, Kernel::tiles};

bool is_there(Kernel kernel) {
    static const bool vectors = has_vectors(), tiles = has_tiles();
    return kernel == Kernel::ggml || (kernel == Kernel::vectors ? vectors : tiles);
}

}  // namespace

const char* name_of(Kernel kernel) {
    return kernel == Kernel::tiles ? "amx" : kernel == Kernel::vectors ? "avx512-bf16" : "ggml";
}

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const Kernel kernel : kKernels) {
        if (is_there(kernel)) names.push_back(name_of(kernel));
    }
    return names;
}

Kernel kernel_named(const std::string& name) {
    if (name == "auto") return is_there(Kernel::tiles) ? Kernel::tiles : Kernel::ggml;
    for (const Kernel kernel : kKernels) {
        if (name != name_of(kernel)) continue;
        if (!is_there(kernel))
            throw Error(ErrorKind::argument, "this processor has no " + name + "; choose auto");
        return kernel;
    }
    throw Error(ErrorKind::argument,
                "there are no kernels " + quoted(name) + ": choose auto, ggml, avx512-bf16 or amx");
}

Readiness::Readiness(Kernel kernel) : kernel_(kernel) {
#if defined(PYDIFFUSION_TILES)
    if (kernel_ == Kernel::tiles) configure_tiles();
#endif
}

Readiness::~Readiness() {
#if defined(PYDIFFUSION_TILES)
    if (kernel_ == Kernel::tiles) release_tiles();
#endif
}

#if defined(PYDIFFUSION_TILES)

void multiply(Kernel kernel, const Operands& operands, int64_t n_weights, int64_t n_columns, int64_t depth,
              bool add) {
    if (kernel == Kernel::tiles) {
        multiply_halves(operands, {0, 0}, n_weights, n_columns, depth, add);
        return;
    }
    for (int64_t j = 0; j < n_columns; j += 2) {
        Operands o = operands;
        o.columns += j * o.column_stride;
        o.products += 2 * j * kProductNumbers;
        for (int64_t i = 0; i < n_weights; ++i)
            (j + 1 < n_columns ? multiply_vectors<2> : multiply_vectors<1>)(o, i, depth, add);
    }
}

void multiply_halves(const Operands& operands, const LowHalves& low, int64_t n_weights, int64_t n_columns,
                     int64_t depth, bool add) {
    for (int64_t j = 0; j < n_columns; j += 2) {
        Operands o = operands;
        o.columns += j * o.column_stride;
        o.products += 2 * j * kProductNumbers;
        const bool two = j + 1 < n_columns;
        const auto f = n_weights > 1 ? (two ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                                     : (two ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
        f(o, low, depth, add, n_columns > kColumnsInFirstCache);
    }
}

#else

void multiply(Kernel, const Operands&, int64_t, int64_t, int64_t, bool) {}
void multiply_halves(const Operands&, const LowHalves&, int64_t, int64_t, int64_t, bool) {}

#endif

}  // namespace matrix
}  // namespace pydiffusion
