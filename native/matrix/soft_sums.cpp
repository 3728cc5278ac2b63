#include "soft_sums.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#if defined(PYDIFFUSION_TILES)
#include <immintrin.h>
#endif

namespace pydiffusion {
namespace matrix {

namespace {

constexpr int64_t kDepth = kSoftRows / kTileDepth;
constexpr int64_t kColumnTiles = kSoftColumns / kTileRows;
constexpr int64_t kPairNumbers = 2 * kColumnTiles * kProductNumbers;  // products of two tiles of tokens

template <typename T>
T* allocate(int64_t n) {
    constexpr size_t alignment = 64;
    void* p = std::aligned_alloc(alignment, (n * sizeof(T) + alignment - 1) / alignment * alignment);
    if (!p) throw std::bad_alloc();
    return static_cast<T*>(p);
}

}  // namespace

void SoftSums::Free::operator()(void* p) const { std::free(p); }

#if defined(PYDIFFUSION_TILES)

#define VECTORS PYDIFFUSION_VECTORS_TARGET

namespace {

VECTORS __m512 floats_of(__m256i bfloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16), 16));
}

// 32 probabilities as two bfloat16 numbers each: the nearest, and the nearest to what is left.
VECTORS void split(const float* p, __mmask32 valid, uint16_t* high, uint16_t* low) {
    const __m512 a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(valid), p);
    const __m512 b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(valid >> 16), p + 16);
    const __m512i h = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    const __m512 rest_a = _mm512_sub_ps(a, floats_of(_mm512_castsi512_si256(h)));
    const __m512 rest_b = _mm512_sub_ps(b, floats_of(_mm512_extracti64x4_epi64(h, 1)));
    _mm512_storeu_si512(high, h);
    _mm512_storeu_si512(low, (__m512i)_mm512_cvtne2ps_pbh(rest_b, rest_a));
}

// Two rows of 32 numbers side by side -> pairs of 16 columns each.
VECTORS void interleave(const uint16_t* even, const uint16_t* odd, uint16_t* left, uint16_t* right) {
    alignas(64) static const uint16_t order[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                   37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                   11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    const __m512i first = _mm512_load_si512(order);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    _mm512_storeu_si512(left, _mm512_permutex2var_epi16(a, first, b));
    _mm512_storeu_si512(right, _mm512_permutex2var_epi16(a, second, b));
}

}  // namespace

SoftSums::SoftSums(int64_t n_tokens)
    : n_tiles_((n_tokens + 2 * kTileRows - 1) / (2 * kTileRows) * 2),
      high_(allocate<uint16_t>(n_tiles_ * kDepth * kTileNumbers)),
      low_(allocate<uint16_t>(n_tiles_ * kDepth * kTileNumbers)),
      rows_(allocate<uint16_t>(kTileDepth * kSoftColumns)),
      columns_(allocate<uint16_t>(kColumnTiles * kDepth * kTileNumbers)),
      products_(allocate<float>(n_tiles_ / 2 * kPairNumbers)) {}

void SoftSums::add(Kernel kernel, const float* const* p, int64_t n_tokens, const Rows& rows, int64_t first,
                   int64_t n) {
    const int64_t depth = (rows.n_rows + kTileDepth - 1) / kTileDepth;
    for (int64_t t = 0; t < n_tiles_ * kTileRows; ++t) {
        const int64_t at = t / kTileRows * depth * kTileNumbers + t % kTileRows * kTileDepth;
        for (int64_t d = 0; d < depth; ++d) {
            const int64_t n_left = t < n_tokens ? rows.n_rows - d * kTileDepth : 0;
            const __mmask32 valid = n_left >= kTileDepth ? ~__mmask32{0} : (__mmask32{1} << n_left) - 1;
            split(p[std::min(t, n_tokens - 1)] + d * kTileDepth, valid, &high_[at + d * kTileNumbers],
                  &low_[at + d * kTileNumbers]);
        }
    }
    const int64_t n_blocks = n / kTileDepth;
    for (int64_t d = 0; d < depth; ++d) {
        const int64_t n_rows = std::min(kTileDepth, rows.n_rows - d * kTileDepth);
        if (n_rows < kTileDepth) std::fill_n(rows_.get(), kTileDepth * kSoftColumns, uint16_t{0});
        const char* data = rows.data + d * kTileDepth * rows.row_bytes;
        unpack({rows.type, data, rows.row_bytes, n_rows}, first, n, rows_.get());
        for (int64_t b = 0; b < n_blocks; ++b) {
            uint16_t* left = &columns_[(2 * b * depth + d) * kTileNumbers];
            for (int64_t r = 0; r < kTileDepth; r += 2) {
                const uint16_t* even =
                    &rows_[((r / kTileRows * n_blocks + b) * kTileRows + r % kTileRows) * kTileDepth];
                interleave(even, even + kTileDepth, left + r / 2 * kTileDepth,
                           left + depth * kTileNumbers + r / 2 * kTileDepth);
            }
        }
    }
    for (int64_t t = 0; t < n_tiles_; t += 2) {
        const int64_t stride = depth * kTileNumbers;
        float* products = &products_[t / 2 * kPairNumbers];
        multiply(kernel, {&high_[t * stride], stride, columns_.get(), stride, products}, 2, 2 * n_blocks,
                 depth, !empty_);
        multiply(kernel, {&low_[t * stride], stride, columns_.get(), stride, products}, 2, 2 * n_blocks,
                 depth, true);
    }
    empty_ = false;
}

void SoftSums::add_to(float* out, int64_t t, int64_t n) const {
    if (empty_) return;
    const float* sums = &products_[t / (2 * kTileRows) * kPairNumbers + t / kTileRows % 2 * kProductNumbers +
                                   t % kTileRows * kTileRows];
    for (int64_t c = 0; c < n; ++c) out[c] += sums[c / kTileRows * 2 * kProductNumbers + c % kTileRows];
}

#else

SoftSums::SoftSums(int64_t) : n_tiles_(0) {}
void SoftSums::add(Kernel, const float* const*, int64_t, const Rows&, int64_t, int64_t) {}
void SoftSums::add_to(float*, int64_t, int64_t) const {}

#endif

}  // namespace matrix
}  // namespace pydiffusion
