#include "util/block_sizes.h"

#include <cstddef>

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

namespace pydiffusion {

static_assert(kSuperBlockWeights == QK_K);
static_assert(kBlockWeights == QK4_0 && kBlockWeights == QK4_1 && kBlockWeights == QK5_0 &&
              kBlockWeights == QK5_1 && kBlockWeights == QK8_0 && kBlockWeights == QK4_NL &&
              kBlockWeights == QK_MXFP4);

// Sizes, and the offsets at which cpu/amx/unpack.cpp, repacked_weights.cpp and cuda/weight_formats.cuh read.
static_assert(sizeof(block_q4_0) == kQ4_0Bytes && offsetof(block_q4_0, qs) == 2);
static_assert(sizeof(block_q4_1) == kQ4_1Bytes && offsetof(block_q4_1, qs) == 4);
static_assert(sizeof(block_q5_0) == kQ5_0Bytes && offsetof(block_q5_0, qh) == 2 &&
              offsetof(block_q5_0, qs) == 6);
static_assert(sizeof(block_q5_1) == kQ5_1Bytes && offsetof(block_q5_1, qh) == 4 &&
              offsetof(block_q5_1, qs) == 8);
static_assert(sizeof(block_q8_0) == kQ8_0Bytes && offsetof(block_q8_0, qs) == 2);
static_assert(sizeof(block_iq4_nl) == kIq4NlBytes && offsetof(block_iq4_nl, qs) == 2);
static_assert(sizeof(block_mxfp4) == kMxfp4Bytes && offsetof(block_mxfp4, qs) == 1);
static_assert(sizeof(block_iq4_xs) == kIq4XsBytes && offsetof(block_iq4_xs, scales_h) == 2 &&
              offsetof(block_iq4_xs, scales_l) == 4 && offsetof(block_iq4_xs, qs) == 8);
static_assert(sizeof(block_q2_K) == kQ2KBytes && offsetof(block_q2_K, scales) == 0 &&
              offsetof(block_q2_K, qs) == 16);
static_assert(sizeof(block_q3_K) == kQ3KBytes && offsetof(block_q3_K, hmask) == 0 &&
              offsetof(block_q3_K, qs) == 32 && offsetof(block_q3_K, scales) == 96 &&
              offsetof(block_q3_K, d) == 108);
static_assert(sizeof(block_q4_K) == kQ4KBytes && offsetof(block_q4_K, scales) == 4 &&
              offsetof(block_q4_K, qs) == 16);
static_assert(sizeof(block_q5_K) == kQ5KBytes && offsetof(block_q5_K, scales) == 4 &&
              offsetof(block_q5_K, qh) == 16 && offsetof(block_q5_K, qs) == 48);
static_assert(sizeof(block_q6_K) == kQ6KBytes && offsetof(block_q6_K, ql) == 0 &&
              offsetof(block_q6_K, qh) == 128 && offsetof(block_q6_K, scales) == 192 &&
              offsetof(block_q6_K, d) == 208);

}  // namespace pydiffusion
