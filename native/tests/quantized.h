// Weights of a type that ggml itself quantizes and dequantizes, and bfloat16 by hand.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "ggml.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

// To the nearest, halves to the even one; finite numbers only.
inline uint16_t bfloat16_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float float_of(uint16_t bfloat16) {
    const uint32_t bits = uint32_t{bfloat16} << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

struct QuantizedRows {
    QuantizedRows(ggml_type t, int64_t rows, int64_t per_row, uint32_t seed)
        : type(t), n_rows(rows), n_per_row(per_row), row_bytes(ggml_row_size(t, per_row)) {
        std::vector<float> values = random_values(static_cast<size_t>(rows * per_row), seed);
        for (int64_t r = 0; r < rows; ++r) {  // rows of all magnitudes
            for (int64_t i = 0; i < per_row; ++i)
                values[r * per_row + i] *= r % 3 == 0 ? 0.02f : r % 3 == 1 ? 1.0f : 30.0f;
        }
        bytes.resize(row_bytes * rows);
        ggml_quantize_chunk(type, values.data(), bytes.data(), 0, rows, per_row, nullptr);
        dequantized.resize(values.size());
        ggml_get_type_traits(type)->to_float(bytes.data(), dequantized.data(), rows * per_row);
    }

    ggml_type type;
    int64_t n_rows, n_per_row;
    size_t row_bytes;
    std::vector<uint8_t> bytes;
    std::vector<float> dequantized;  // by ggml
};

// All that can_unpack() should take, and some that it should not.
inline std::vector<ggml_type> unpackable_types() {
    return {GGML_TYPE_BF16,   GGML_TYPE_Q8_0,  GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,  GGML_TYPE_Q5_0,
            GGML_TYPE_Q5_1,   GGML_TYPE_MXFP4, GGML_TYPE_Q2_K, GGML_TYPE_Q3_K,  GGML_TYPE_Q4_K,
            GGML_TYPE_IQ4_NL, GGML_TYPE_Q5_K,  GGML_TYPE_Q6_K, GGML_TYPE_IQ4_XS};
}

}  // namespace testing
}  // namespace pydiffusion
