#include "backend/cpu/amx/unpack.h"

#include <cstring>

#include "backend/cpu/amx/intrinsics.h"
#include "util/aligned_buffer.h"
#include "util/block_sizes.h"

namespace pydiffusion {
namespace gemm {

#if defined(PYDIFFUSION_AMX)

namespace {

// Unpacks `n` weights of a row, 32 at a time to out, out + kTileElements, ...
using UnpackRow = void (*)(const uint8_t* row, int64_t n, uint16_t* out);
static_assert(kBlockWeights == kTileDepth && kSuperBlockWeights % kTileDepth == 0);

TARGET_AVX512 inline float half_at(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}

TARGET_AVX512 inline void store(uint16_t* out, __m512 low, __m512 high) {
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

TARGET_AVX512 inline void store(uint16_t* out, __m512i table, __m512i indices) {
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(indices, table));
}

TARGET_AVX512 inline __m512i table_of(__m512 low, __m512 high) {
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

TARGET_AVX512 inline __m512 count_up() {
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

TARGET_AVX512 inline __m512i words_of(const uint8_t* bytes) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
}

// 32 weights of 4 bits in 16 bytes: the low nibbles first.
TARGET_AVX512 inline __m512i nibbles_of(const uint8_t* bytes) {
    const __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m256i low = _mm256_and_si256(w, _mm256_set1_epi16(15)), high = _mm256_srli_epi16(w, 4);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

TARGET_AVX512 inline __m512 floats_of(const int8_t* bytes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
}

// --- blocks of 32: weights are looked up in a table of the block's values ---

TARGET_AVX512 void unpack_q8_0(const uint8_t* row, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; i += kBlockWeights, row += kQ8_0Bytes, out += kTileElements) {
        const __m512 d = _mm512_set1_ps(half_at(row));
        const auto* q = reinterpret_cast<const int8_t*>(row + 2);
        store(out, _mm512_mul_ps(floats_of(q), d), _mm512_mul_ps(floats_of(q + 16), d));
    }
}

TARGET_AVX512 void unpack_q4_0(const uint8_t* row, int64_t n, uint16_t* out) {
    const __m512 values = _mm512_sub_ps(count_up(), _mm512_set1_ps(8.0f));
    for (int64_t i = 0; i < n; i += kBlockWeights, row += kQ4_0Bytes, out += kTileElements) {
        const __m512 entries = _mm512_mul_ps(values, _mm512_set1_ps(half_at(row)));
        store(out, table_of(entries, entries), nibbles_of(row + 2));
    }
}

TARGET_AVX512 void unpack_q4_1(const uint8_t* row, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; i += kBlockWeights, row += kQ4_1Bytes, out += kTileElements) {
        const __m512 entries =
            _mm512_fmadd_ps(count_up(), _mm512_set1_ps(half_at(row)), _mm512_set1_ps(half_at(row + 2)));
        store(out, table_of(entries, entries), nibbles_of(row + 4));
    }
}

// Adds the fifth bits; bit i is weight i's.
TARGET_AVX512 inline __m512i with_fifth_bits(__m512i nibbles, const uint8_t* bits) {
    uint32_t mask;
    std::memcpy(&mask, bits, sizeof mask);
    return _mm512_mask_add_epi16(nibbles, mask, nibbles, _mm512_set1_epi16(16));
}

TARGET_AVX512 void unpack_q5_0(const uint8_t* row, int64_t n, uint16_t* out) {
    const __m512 sixteen = _mm512_set1_ps(16.0f);
    for (int64_t i = 0; i < n; i += kBlockWeights, row += kQ5_0Bytes, out += kTileElements) {
        const __m512 d = _mm512_set1_ps(half_at(row));
        const __m512 high = _mm512_mul_ps(count_up(), d);
        const __m512i table = table_of(_mm512_fnmadd_ps(sixteen, d, high), high);
        store(out, table, with_fifth_bits(nibbles_of(row + 6), row + 2));
    }
}

TARGET_AVX512 void unpack_q5_1(const uint8_t* row, int64_t n, uint16_t* out) {
    const __m512 sixteen = _mm512_set1_ps(16.0f);
    for (int64_t i = 0; i < n; i += kBlockWeights, row += kQ5_1Bytes, out += kTileElements) {
        const __m512 d = _mm512_set1_ps(half_at(row));
        const __m512 low = _mm512_fmadd_ps(count_up(), d, _mm512_set1_ps(half_at(row + 2)));
        const __m512i table = table_of(low, _mm512_fmadd_ps(sixteen, d, low));
        store(out, table, with_fifth_bits(nibbles_of(row + 8), row + 4));
    }
}

// The 16 values of IQ4_NL and IQ4_XS, and those of MXFP4, doubled (ggml-common.h, and E2M1 of the OCP
// microscaling formats).
TARGET_AVX512 inline __m512 iq4_values() {
    return _mm512_setr_ps(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
}

TARGET_AVX512 inline __m512 fp4_values() {
    return _mm512_setr_ps(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
}

TARGET_AVX512 void unpack_iq4_nl(const uint8_t* row, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; i += kBlockWeights, row += kIq4NlBytes, out += kTileElements) {
        const __m512 entries = _mm512_mul_ps(iq4_values(), _mm512_set1_ps(half_at(row)));
        store(out, table_of(entries, entries), nibbles_of(row + 2));
    }
}

TARGET_AVX512 void unpack_mxfp4(const uint8_t* row, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; i += kBlockWeights, row += kMxfp4Bytes, out += kTileElements) {
        const __m512 half = _mm512_set1_ps(0.5f);
        const __m512 exponent = _mm512_set1_ps(static_cast<float>(*row) - 127.0f);
        const __m512 entries = _mm512_mul_ps(_mm512_scalef_ps(half, exponent), fp4_values());
        store(out, table_of(entries, entries), nibbles_of(row + 1));
    }
}

// --- blocks of 256 ---

TARGET_AVX512 void unpack_iq4_xs(const uint8_t* row, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; i += kSuperBlockWeights, row += kIq4XsBytes) {
        const float d = half_at(row);
        uint16_t high;
        std::memcpy(&high, row + 2, sizeof high);
        for (int j = 0; j < 8; ++j, out += kTileElements) {
            const int low = row[4 + j / 2] >> 4 * (j % 2) & 15;
            const int scale = (low | (high >> 2 * j & 3) << 4) - 32;
            const __m512 entries = _mm512_mul_ps(iq4_values(), _mm512_set1_ps(d * static_cast<float>(scale)));
            store(out, table_of(entries, entries), nibbles_of(row + 8 + 16 * j));
        }
    }
}

// Forces values into memory: broadcasts from memory are nearly free, but compilers would use shuffles.
template <typename T>
inline void force_into_memory(T& values) {
    asm volatile("" : "+m"(values));
}

// Scales and minimums of the 8 groups of 32 in a Q4_K or Q5_K block: 6 bits each in 12 bytes.
struct Groups {
    float scale[8], minimum[8];
};

TARGET_AVX512 inline Groups groups_of(const uint8_t* block) {
    uint32_t w[3];
    std::memcpy(w, block + 4, sizeof w);
    const uint64_t scales =
        (w[0] & 0x3f3f3f3f) | uint64_t{(w[2] & 0x0f0f0f0f) | (w[0] >> 6 & 0x03030303) << 4} << 32;
    const uint64_t minima =
        (w[1] & 0x3f3f3f3f) | uint64_t{(w[2] >> 4 & 0x0f0f0f0f) | (w[1] >> 6 & 0x03030303) << 4} << 32;
    const auto floats = [](uint64_t bytes, float factor) PYDIFFUSION_TARGET_AVX512 {
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes)));
        return _mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(factor));
    };
    Groups groups;
    _mm256_storeu_ps(groups.scale, floats(scales, half_at(block)));
    _mm256_storeu_ps(groups.minimum, floats(minima, half_at(block + 2)));
    force_into_memory(groups);
    return groups;
}

TARGET_AVX512 void unpack_q4_k(const uint8_t* row, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; i += kSuperBlockWeights, row += kQ4KBytes) {
        const Groups g = groups_of(row);
        for (int j = 0; j < 8; j += 2, out += 2 * kTileElements) {
            // One table for two groups: the first's 16 entries, then the second's.
            const __m512i table = table_of(
                _mm512_fmsub_ps(count_up(), _mm512_set1_ps(g.scale[j]), _mm512_set1_ps(g.minimum[j])),
                _mm512_fmsub_ps(count_up(), _mm512_set1_ps(g.scale[j + 1]),
                                _mm512_set1_ps(g.minimum[j + 1])));
            const __m512i words = words_of(row + 16 + 16 * j), sixteen = _mm512_set1_epi16(16);
            store(out, table, _mm512_and_si512(words, _mm512_set1_epi16(15)));
            store(out + kTileElements, table, _mm512_or_si512(_mm512_srli_epi16(words, 4), sixteen));
        }
    }
}

TARGET_AVX512 void unpack_q5_k(const uint8_t* row, int64_t n, uint16_t* out) {
    const __m512 sixteen = _mm512_set1_ps(16.0f);
    for (int64_t i = 0; i < n; i += kSuperBlockWeights, row += kQ5KBytes) {
        const Groups g = groups_of(row);
        const __m256i fifth = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 16));
        for (int j = 0; j < 8; ++j, out += kTileElements) {
            const __m512 scale = _mm512_set1_ps(g.scale[j]);
            const __m512 low = _mm512_fmsub_ps(count_up(), scale, _mm512_set1_ps(g.minimum[j]));
            const __m512i table = table_of(low, _mm512_fmadd_ps(sixteen, scale, low));
            const __m512i words = words_of(row + 48 + 32 * (j / 2));
            const __m512i nibbles =
                j % 2 ? _mm512_srli_epi16(words, 4) : _mm512_and_si512(words, _mm512_set1_epi16(15));
            const __mmask32 bits = _mm256_test_epi8_mask(fifth, _mm256_set1_epi8(static_cast<char>(1 << j)));
            store(out, table, _mm512_mask_add_epi16(nibbles, bits, nibbles, _mm512_set1_epi16(16)));
        }
    }
}

TARGET_AVX512 inline __m512 scaled(__m128i bytes, float scale) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), _mm512_set1_ps(scale));
}

TARGET_AVX512 void unpack_q6_k(const uint8_t* row, int64_t n, uint16_t* out) {
    const __m256i fifteen = _mm256_set1_epi8(15), high_bits = _mm256_set1_epi8(48);
    for (int64_t i = 0; i < n; i += kSuperBlockWeights, row += kQ6KBytes) {
        struct {
            float of_group[16];
        } scales;
        _mm512_storeu_ps(scales.of_group, _mm512_mul_ps(floats_of(reinterpret_cast<const int8_t*>(row + 192)),
                                                        _mm512_set1_ps(half_at(row + 208))));
        force_into_memory(scales);
        for (int half = 0; half < 2; ++half) {
            const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 128 + 32 * half));
            for (int j = 0; j < 4; ++j, out += kTileElements) {
                const uint8_t* low = row + 64 * half + 32 * (j % 2);
                __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
                q = _mm256_and_si256(j < 2 ? q : _mm256_srli_epi16(q, 4), fifteen);
                // Bits 2 j and 2 j + 1 of `high` become bits 4 and 5.
                const __m256i shifted =
                    j < 2 ? _mm256_slli_epi16(high, 4 - 2 * j) : _mm256_srli_epi16(high, 2 * j - 4);
                q = _mm256_or_si256(q, _mm256_and_si256(shifted, high_bits));
                q = _mm256_sub_epi8(q, _mm256_set1_epi8(32));
                const float* scale = scales.of_group + 8 * half + 2 * j;
                store(out, scaled(_mm256_castsi256_si128(q), scale[0]),
                      scaled(_mm256_extracti128_si256(q, 1), scale[1]));
            }
        }
    }
}

// Q2_K and Q3_K have a scale per group of 16 weights, and one table holds several groups: entry e is value
// e % n_values of group e / n_values. By lane, the group and the value:
TARGET_AVX512 inline __m512i lane_groups(int n_values) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return n_values == 4 ? _mm512_srli_epi32(lanes, 2) : _mm512_srli_epi32(lanes, 3);
}

TARGET_AVX512 inline __m512 lane_values(int n_values) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_cvtepi32_ps(_mm512_and_si512(lanes, _mm512_set1_epi32(n_values - 1)));
}

// Two bits of each of 32 words, from bit `shift` on; adds `low` to the first 16, and `high` to the others.
TARGET_AVX512 inline __m512i two_bits_of(__m512i words, int shift, int low, int high) {
    const __m512i bits =
        _mm512_and_si512(_mm512_srl_epi16(words, _mm_cvtsi32_si128(shift)), _mm512_set1_epi16(3));
    const __m512i base = _mm512_inserti64x4(_mm512_set1_epi16(static_cast<int16_t>(low)),
                                            _mm256_set1_epi16(static_cast<int16_t>(high)), 1);
    return _mm512_add_epi16(bits, base);
}

TARGET_AVX512 void unpack_q2_k(const uint8_t* row, int64_t n, uint16_t* out) {
    const __m512i groups = lane_groups(4), four = _mm512_set1_epi32(4);
    const __m512 values = lane_values(4);
    for (int64_t i = 0; i < n; i += kSuperBlockWeights, row += kQ2KBytes) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
        const __m512i both = _mm512_cvtepu8_epi32(bytes);
        const __m512 scales = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15))),
                                            _mm512_set1_ps(half_at(row + 80)));
        const __m512 minima =
            _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(both, 4)), _mm512_set1_ps(half_at(row + 82)));
        for (int half = 0; half < 2; ++half) {
            const __m512i first = _mm512_add_epi32(groups, _mm512_set1_epi32(8 * half));
            const __m512i second = _mm512_add_epi32(first, four);
            const __m512i table = table_of(_mm512_fmsub_ps(_mm512_permutexvar_ps(first, scales), values,
                                                           _mm512_permutexvar_ps(first, minima)),
                                           _mm512_fmsub_ps(_mm512_permutexvar_ps(second, scales), values,
                                                           _mm512_permutexvar_ps(second, minima)));
            const __m512i words = words_of(row + 16 + 32 * half);
            for (int j = 0; j < 4; ++j, out += kTileElements)
                store(out, table, two_bits_of(words, 2 * j, 8 * j, 8 * j + 4));
        }
    }
}

// 16 scales of 6 bits: the low four bits in 8 bytes of nibbles, the high two in another 4 bytes.
TARGET_AVX512 inline __m512 q3_k_scales(const uint8_t* bytes, float d) {
    uint64_t low;
    uint32_t high;
    std::memcpy(&low, bytes, sizeof low);
    std::memcpy(&high, bytes + 8, sizeof high);
    const auto top = [high](int shift) { return uint64_t{(high >> shift & 0x03030303) << 4}; };
    const uint64_t nibbles = 0x0f0f0f0f0f0f0f0f;
    const uint64_t first = (low & nibbles) | top(0) | top(2) << 32;
    const uint64_t last = (low >> 4 & nibbles) | top(4) | top(6) << 32;
    const __m128i scales = _mm_set_epi64x(static_cast<long long>(last), static_cast<long long>(first));
    const __m512i centered = _mm512_sub_epi32(_mm512_cvtepu8_epi32(scales), _mm512_set1_epi32(32));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(centered), _mm512_set1_ps(d));
}

TARGET_AVX512 void unpack_q3_k(const uint8_t* row, int64_t n, uint16_t* out) {
    const __m512i groups = lane_groups(8);
    const __m512 values = _mm512_sub_ps(lane_values(8), _mm512_set1_ps(4.0f));
    for (int64_t i = 0; i < n; i += kSuperBlockWeights, row += kQ3KBytes) {
        const __m256i third = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
        const __m512 scales = q3_k_scales(row + 96, half_at(row + 108));
        for (int half = 0; half < 2; ++half) {
            const __m512i words = words_of(row + 32 + 32 * half);
            for (int j = 0; j < 4; ++j, out += kTileElements) {
                const __m512i first = _mm512_add_epi32(groups, _mm512_set1_epi32(8 * half + 2 * j));
                const __m512 low = _mm512_mul_ps(_mm512_permutexvar_ps(first, scales), values);
                const __m512i bits = two_bits_of(words, 2 * j, 0, 8);
                const __mmask32 set =
                    _mm256_test_epi8_mask(third, _mm256_set1_epi8(static_cast<char>(1 << (4 * half + j))));
                store(out, table_of(low, low), _mm512_mask_add_epi16(bits, set, bits, _mm512_set1_epi16(4)));
            }
        }
    }
}

// --- bfloat16 ---

void copy_bf16(const uint8_t* row, int64_t n, uint16_t* out) {
    for (; n >= kTileDepth; n -= kTileDepth, row += 2 * kTileDepth, out += kTileElements)
        std::memcpy(out, row, 2 * kTileDepth);
    if (n == 0) return;
    std::memcpy(out, row, 2 * n);
    std::memset(out + n, 0, 2 * (kTileDepth - n));
}

UnpackRow unpacker_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_BF16:
            return copy_bf16;
        case GGML_TYPE_Q8_0:
            return unpack_q8_0;
        case GGML_TYPE_Q4_0:
            return unpack_q4_0;
        case GGML_TYPE_Q4_1:
            return unpack_q4_1;
        case GGML_TYPE_Q5_0:
            return unpack_q5_0;
        case GGML_TYPE_Q5_1:
            return unpack_q5_1;
        case GGML_TYPE_IQ4_NL:
            return unpack_iq4_nl;
        case GGML_TYPE_IQ4_XS:
            return unpack_iq4_xs;
        case GGML_TYPE_MXFP4:
            return unpack_mxfp4;
        case GGML_TYPE_Q2_K:
            return unpack_q2_k;
        case GGML_TYPE_Q3_K:
            return unpack_q3_k;
        case GGML_TYPE_Q4_K:
            return unpack_q4_k;
        case GGML_TYPE_Q5_K:
            return unpack_q5_k;
        case GGML_TYPE_Q6_K:
            return unpack_q6_k;
        default:
            return nullptr;
    }
}

}  // namespace

bool can_unpack(ggml_type type, int64_t n_per_row) {
    return unpacker_of(type) && (type == GGML_TYPE_BF16 || n_per_row % kTileDepth == 0);
}

void unpack(const Rows& rows, uint16_t* tiles, const Prefetch& ahead) {
    const UnpackRow unpack_row = unpacker_of(rows.type);
    const int64_t depth = depth_of(rows.n);
    const int64_t n_padded = (rows.n_rows + kTileRows - 1) / kTileRows * kTileRows;
    const char* data = rows.data + ggml_row_size(rows.type, rows.first);
    for (int64_t r = 0; r < n_padded; ++r) {
        for (size_t at = 0; at < ahead.n_bytes; at += kCacheLine)
            _mm_prefetch(ahead.data + r * ahead.stride + at, _MM_HINT_T1);
        uint16_t* out = tiles + r / kTileRows * depth * kTileElements + r % kTileRows * kTileDepth;
        if (r >= rows.n_rows) {
            for (int64_t d = 0; d < depth; ++d) std::memset(out + d * kTileElements, 0, 2 * kTileDepth);
            continue;
        }
        const auto* row = reinterpret_cast<const uint8_t*>(data + r * rows.row_bytes);
        unpack_row(row, rows.n, out);
    }
}

#else

bool can_unpack(ggml_type, int64_t) { return false; }
void unpack(const Rows&, uint16_t*, const Prefetch&) {}

#endif

}  // namespace gemm
}  // namespace pydiffusion
