// float16 as the device rounds it: to nearest even, with subnormals; NaN is 0x7fff.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pydiffusion::emulation {

inline float half_to_float(uint16_t half) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const float sign = half & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * static_cast<float>(mantissa) * 0x1p-24f;
    const uint32_t bits = (half & 0x8000u) << 16 | static_cast<uint32_t>(exponent + 112) << 23 |
                          static_cast<uint32_t>(mantissa) << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint16_t half_from(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const auto sign = static_cast<uint32_t>(bits >> 63 << 15);
    const int exponent = static_cast<int>(bits >> 52 & 2047) - 1023;
    const uint64_t mantissa = bits & ((uint64_t{1} << 52) - 1);
    if (exponent == 1024 && mantissa) return 0x7fff;
    if (exponent > 15) return static_cast<uint16_t>(sign | 0x7c00);
    if (exponent < -25) return static_cast<uint16_t>(sign);  // less than half the smallest subnormal
    const uint64_t full = mantissa | uint64_t{1} << 52;
    const int shift = exponent >= -14 ? 42 : 28 - exponent;  // to units of the result's last bit
    const uint64_t rest = full & ((uint64_t{1} << shift) - 1), middle = uint64_t{1} << (shift - 1);
    auto units = static_cast<uint32_t>(full >> shift);
    if (rest > middle || (rest == middle && (units & 1))) ++units;
    // The implicit bit, and a carry out of the mantissa, add one to the exponent.
    if (exponent >= -14) units += static_cast<uint32_t>(exponent + 14) << 10;
    return static_cast<uint16_t>(sign | units);
}

}  // namespace pydiffusion::emulation
