#include "backend/cpu/amx/pack.h"

#include "backend/cpu/amx/intrinsics.h"

namespace pydiffusion {
namespace gemm {

#if defined(PYDIFFUSION_AMX)

namespace {

// Transposes a 16 x 16 matrix of 32-bit elements: by pairs, then pairs of pairs, then quarters of the
// vectors.
TARGET_AVX512 inline void transpose(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // Quarter q of v[4 a + b] now has rows 4 a .. 4 a + 3 of column 4 q + b.
    for (int b = 0; b < 4; ++b) {
        t[b] = _mm512_shuffle_i32x4(v[b], v[4 + b], 0x88);
        t[4 + b] = _mm512_shuffle_i32x4(v[b], v[4 + b], 0xdd);
        t[8 + b] = _mm512_shuffle_i32x4(v[8 + b], v[12 + b], 0x88);
        t[12 + b] = _mm512_shuffle_i32x4(v[8 + b], v[12 + b], 0xdd);
    }
    for (int b = 0; b < 4; ++b) {
        v[b] = _mm512_shuffle_i32x4(t[b], t[8 + b], 0x88);
        v[4 + b] = _mm512_shuffle_i32x4(t[4 + b], t[12 + b], 0x88);
        v[8 + b] = _mm512_shuffle_i32x4(t[b], t[8 + b], 0xdd);
        v[12 + b] = _mm512_shuffle_i32x4(t[4 + b], t[12 + b], 0xdd);
    }
}

TARGET_AVX512 __m512 floats_of(__m256i bfloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16), 16));
}

}  // namespace

TARGET_AVX512 void split(const float* values, uint32_t valid, uint16_t* high, uint16_t* low) {
    const __m512 a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(valid), values);
    const __m512 b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(valid >> 16), values + 16);
    const __m512i h = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    const __m512 residual_a = _mm512_sub_ps(a, floats_of(_mm512_castsi512_si256(h)));
    const __m512 residual_b = _mm512_sub_ps(b, floats_of(_mm512_extracti64x4_epi64(h, 1)));
    _mm512_storeu_si512(high, h);
    _mm512_storeu_si512(low, (__m512i)_mm512_cvtne2ps_pbh(residual_b, residual_a));
}

namespace {

// Packs elements [k, k + 32), of which those of a 0 in `valid` are not read and become 0.
TARGET_AVX512 inline void pack_pairs(const float* const* activations, int64_t k, uint32_t valid,
                                     uint16_t* tile) {
    const __mmask16 first = static_cast<__mmask16>(valid), second = static_cast<__mmask16>(valid >> 16);
    __m512i pairs[16];
    for (int c = 0; c < 16; ++c) {
        pairs[c] = activations[c]
                       ? (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(second, activations[c] + k + 16),
                                                      _mm512_maskz_loadu_ps(first, activations[c] + k))
                       : _mm512_setzero_si512();
    }
    transpose(pairs);
    for (int p = 0; p < 16; ++p) _mm512_storeu_si512(tile + p * kTileDepth, pairs[p]);
}

}  // namespace

TARGET_AVX512 void pack_activations(const float* const* activations, int64_t n, uint16_t* tiles) {
    for (int64_t k = 0; k < n; k += kTileDepth, tiles += kTileElements)
        pack_pairs(activations, k, n - k >= kTileDepth ? ~uint32_t{0} : (uint32_t{1} << (n - k)) - 1, tiles);
}

TARGET_AVX512 void store_tile(const float* tile, int64_t n_rows, float* const* targets,
                              int64_t n_activations) {
    __m512i v[16];
    for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(tile + i * kTileRows);
    transpose(v);
    const __mmask16 row_mask = static_cast<__mmask16>((1u << n_rows) - 1);
    for (int64_t c = 0; c < n_activations; ++c) _mm512_mask_storeu_epi32(targets[c], row_mask, v[c]);
}

#else

void pack_activations(const float* const*, int64_t, uint16_t*) {}
void split(const float*, uint32_t, uint16_t*, uint16_t*) {}
void store_tile(const float*, int64_t, float* const*, int64_t) {}

#endif

}  // namespace gemm
}  // namespace pydiffusion
