// Blocks of the quantized types that our kernels read themselves: weights per block, bytes per block. ggml's
// own numbers are in a header that defines far more than kernels want; block_sizes.cpp compares with it.
#pragma once

namespace pydiffusion {

constexpr int kBlockWeights = 32;        // of Q4_0 to Q8_0, IQ4_NL, MXFP4
constexpr int kSuperBlockWeights = 256;  // of k-quants and IQ4_XS

constexpr int kQ4_0Bytes = 18, kQ4_1Bytes = 20, kQ5_0Bytes = 22, kQ5_1Bytes = 24, kQ8_0Bytes = 34;
constexpr int kIq4NlBytes = 18, kMxfp4Bytes = 17;
constexpr int kQ2KBytes = 84, kQ3KBytes = 110, kQ4KBytes = 144, kQ5KBytes = 176, kQ6KBytes = 210;
constexpr int kIq4XsBytes = 136;

}  // namespace pydiffusion
