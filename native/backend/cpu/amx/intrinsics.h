// The intrinsics, and VECTORS: before a function that uses those of AVX-512.
#pragma once

#include "backend/cpu/amx/tile_gemm.h"

#if defined(PYDIFFUSION_TILES)
#include <immintrin.h>

#define VECTORS PYDIFFUSION_VECTORS_TARGET
#endif
