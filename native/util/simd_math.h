// exp, exp2 and tanh as plain float arithmetic that compilers vectorize; rounding to bfloat16; prefetch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pydiffusion {

// exp(x) to about 2 ulp for x in [-87, 60], clamped outside; NaN gives exp(-87). -87 is the limit of normal
// floats. 60 is low enough that vectorized callers, which compute the clamped case in all lanes, don't hit
// subnormals (x / exp(88) is one, and costs a hundred cycles). Range reduction x = n ln 2 + r with ln 2 in
// two parts, then the Taylor series of exp(r) to degree 7 in Horner's form.
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

// 2^x to about 1e-7 relative, for x in [-126, 126]. Adding 1.5 * 2^23 rounds x to an integer, which is then
// in the low bits of the mantissa; the rest in [-0.5, 0.5] goes through a polynomial fitted at Chebyshev
// nodes.
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

// Prefetches a cache line that will be read soon.
inline void prefetch(const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#else
    (void)address;
#endif
}

// Rounds to the nearest bfloat16, ties to even, as CPUs do; returned as a float. Keeps NaN and infinity.
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

// tanh(x) for x in [-1, 1], to about 1e-7 absolute, without a division: x times a polynomial in x^2 fitted at
// Chebyshev nodes.
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
