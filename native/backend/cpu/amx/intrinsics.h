// x86 intrinsics; TARGET_AVX512, the attribute of functions that use AVX-512; bfloat16 pairs.
#pragma once

#include "backend/cpu/amx/tile_gemm.h"

#if defined(PYDIFFUSION_AMX)
#include <immintrin.h>

#define TARGET_AVX512 PYDIFFUSION_TARGET_AVX512

namespace pydiffusion {
namespace gemm {

// Interleaves two rows of 16 values as bfloat16 pairs.
TARGET_AVX512 inline __m512i pairs_of(__m512 even, __m512 odd) {
    alignas(64) static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                   21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                   11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

}  // namespace gemm
}  // namespace pydiffusion
#endif
