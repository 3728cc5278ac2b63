// x86 intrinsics, and TARGET_AVX512: the attribute of functions that use AVX-512.
#pragma once

#include "backend/cpu/amx/tile_gemm.h"

#if defined(PYDIFFUSION_AMX)
#include <immintrin.h>

#define TARGET_AVX512 PYDIFFUSION_TARGET_AVX512
#endif
