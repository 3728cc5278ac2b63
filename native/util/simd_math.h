// exp and tanh that compilers turn into vector code; plain functions of floats, no table.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pydiffusion {

// exp(x) to about 2 ulp for x in [-87, 60]; smaller x give exp(-87), larger exp(60). The limits are what
// float allows below, and above low enough that compilers, which like to compute the clamped case for all
// lanes, don't run into subnormal numbers there (x / exp(88) is one, and costs a hundred cycles). NaN gives
// exp(60). Range reduction x = n ln 2 + r with ln 2 in two parts, then the series of exp(r) to degree 7 in
// Horner's form.
inline float vector_exp(float x) {
    x = x > -87.0f ? x : -87.0f;
    x = x < 60.0f ? x : 60.0f;
    const float n = std::floor(x * 1.44269504088896341f + 0.5f);
    float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

// 2^x to about 1e-7 of it, for x in [-126, 126]. Adding 1.5 * 2^23 rounds x to a whole number, which then
// stands in the last bits; the rest in [-0.5, 0.5] goes through a polynomial fitted at Chebyshev's nodes.
inline float small_exp2(float x) {
    constexpr float magic = 12582912.0f;
    const float rounded = x + magic, r = x - (rounded - magic);
    float p = 1.5461444854736348e-4f;
    p = p * r + 1.3400427997112274e-3f;
    p = p * r + 9.618056937813759e-3f;
    p = p * r + 5.550327152013779e-2f;
    p = p * r + 2.4022650718688965e-1f;
    p = p * r + 6.931471824645996e-1f;
    p = p * r + 1.0f;
    uint32_t power, bits;
    std::memcpy(&power, &rounded, sizeof power);
    std::memcpy(&bits, &p, sizeof bits);
    bits += power << 23;
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

// Asks for memory that will be read soon.
inline void fetch_ahead(const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#else
    (void)address;
#endif
}

// To the nearest bfloat16, halves to the even one, as processors round; still a float. NaN and infinity stay.
inline float nearest_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const bool is_finite = (bits & 0x7f800000) != 0x7f800000;
    bits = (bits + (is_finite ? 0x7fff + (bits >> 16 & 1) : 0)) & 0xffff0000;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// tanh(x) = 1 - 2 / (exp(2x) + 1), to about 1e-7 absolute.
inline float vector_tanh(float x) { return 1.0f - 2.0f / (vector_exp(2.0f * x) + 1.0f); }

// tanh(x) for x in [-1, 1], to about 1e-7 absolute: x times a polynomial in x^2 fitted at Chebyshev's nodes,
// without the division.
inline float small_tanh(float x) {
    const float t = x * x;
    float p = 1.0380251333117485e-3f;
    p = p * t - 6.1943246982991695e-3f;
    p = p * t + 2.027970738708973e-2f;
    p = p * t - 5.3451646119356155e-2f;
    p = p * t + 1.3325075805187225e-1f;
    p = p * t - 3.333282768726349e-1f;
    p = p * t + 9.999999403953552e-1f;
    return x * p;
}

}  // namespace pydiffusion
