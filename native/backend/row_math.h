// Softmax statistics of one row of logits as GPU kernels compute them: sums of chunks of kChunk tokens, then
// of the row, in a fixed order. Compiled by nvcc and, for tests, by the host compiler.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PD_HOST_DEVICE inline
#endif

namespace pydiffusion::row {

// --- exponentials, in powers of 2 ---

constexpr float kLog2E = 1.442695041f, kLn2 = 0.6931471806f;

// log2(e) / temperature; temperatures whose inverse is infinite act like 0, which gives the argmax.
PD_HOST_DEVICE float scale_of(float temperature) {
    const float inverse = 1.0f / temperature;
    return kLog2E * (inverse < FLT_MAX / 2 ? inverse : FLT_MAX / 2);
}

// log2 of exp((x - maximum) / temperature).
PD_HOST_DEVICE float exponent(float x, float maximum, float scale) { return (x - maximum) * scale; }

// 2^z; NaN stays NaN. On a GPU one instruction, to 2 units in the last place, without subnormal results.
PD_HOST_DEVICE float power(float z) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(z));
    return result;
#else
    return exp2f(z);
#endif
}

// power(kLeastExponent) is 0, so that power(z) * bounded(z) is 0 for z = -infinity.
constexpr float kLeastExponent = -200.0f;
PD_HOST_DEVICE float bounded(float z) { return fmaxf(z, kLeastExponent); }

// --- soft cap ---

// cap * tanh(x / cap) to 2.5e-7 of it; NaN and +infinity, which capping would hide, give NaN.
struct SoftCap {
    float cap, inverse;

    // For |x| <= cap: x plus x times a polynomial in (x / cap)^2, fitted to tanh(y) / y - 1.
    PD_HOST_DEVICE float small(float x) const {
        const float y = x * inverse, s = y * y;
        float p = 0.0010582642862573266f;
        p = fmaf(p, s, -0.006259338464587927f);
        p = fmaf(p, s, 0.020359758287668228f);
        p = fmaf(p, s, -0.053498707711696625f);
        p = fmaf(p, s, 0.13326409459114075f);
        p = fmaf(p, s, -0.33332985639572144f);
        return fmaf(x, p * s, x);
    }
    // For others: by 1 - 2 / (exp(2 |x| / cap) + 1).
    PD_HOST_DEVICE float large(float x) const {
        const float e = power(fabsf(x) * (2.0f * kLog2E * inverse));
        const float magnitude = fmaf(-2.0f * cap, 1.0f / (1.0f + e), cap);
        return x <= FLT_MAX ? copysignf(magnitude, x) : NAN;
    }
    PD_HOST_DEVICE bool is_small(float x) const { return fabsf(x) <= cap; }
    PD_HOST_DEVICE float operator()(float x) const { return is_small(x) ? small(x) : large(x); }
};

PD_HOST_DEVICE SoftCap soft_cap(float cap) { return {cap, 1.0f / cap}; }

// --- sums ---

constexpr int kLanes = 32;
constexpr int kChunk = 256;  // consecutive tokens that a warp sums

PD_HOST_DEVICE int64_t n_chunks_of(int64_t n_vocab) { return (n_vocab + kChunk - 1) / kChunk; }

// Sums over some of a row's tokens, with z = exponent(x, maximum, scale). One that is NaN or +infinity makes
// `weight` NaN; -infinity is a masked token.
struct Sums {
    float maximum;   // of those that aren't NaN; -infinity if there are none
    float weight;    // sum of 2^z
    float weighted;  // sum of 2^z * z
};

// Adds x, which is at most the maximum.
PD_HOST_DEVICE void add(Sums& sums, float x, float scale) {
    // With -FLT_MAX in place of -infinity, whose differences would be NaN.
    const float z = exponent(x, fmaxf(sums.maximum, -FLT_MAX), scale), e = power(z);
    sums.weight += e;
    sums.weighted += e * bounded(z);
}

// The same relative to another maximum, at least as large.
PD_HOST_DEVICE Sums rescaled(const Sums& sums, float maximum, float scale) {
    const float shift = bounded(exponent(sums.maximum, maximum, scale)), factor = power(shift);
    return {maximum, factor * sums.weight, factor * (sums.weighted + shift * sums.weight)};
}

// Whether the tokens are a distribution: none is NaN or +infinity, not all of them are masked.
PD_HOST_DEVICE bool is_valid(const Sums& sums) {
    return sums.maximum >= -FLT_MAX && sums.weight == sums.weight;
}

// In nats.
PD_HOST_DEVICE float entropy(const Sums& sums) {
    return fmaxf(0.0f, logf(sums.weight) - kLn2 * (sums.weighted / sums.weight));
}

// --- top of the distribution, for self-conditioning ---

// Self-conditioning keeps the probabilities that are at least a threshold. Candidates, largest first; below
// the last one, even a whole vocabulary sums to less than half an ulp of 1.0f.
constexpr int kThresholds = 8;

PD_HOST_DEVICE float threshold(int i) {
    const float values[kThresholds] = {1e-4f, 1e-5f, 1e-6f, 1e-7f, 1e-8f, 1e-9f, 1e-10f, 1e-13f};
    return values[i];
}

// A position that keeps at most this many tokens of its distribution gathers their embeddings; a flatter one
// goes through a dense GEMM with the whole embedding, and keeps what reaches the last threshold.
constexpr int32_t kMaxGathered = 1024;

// Entropies above this take more than kMaxGathered tokens, whatever `dropped` of the mass is left out: the
// largest entropy is that of two uniform parts. Rounding is far below the last term.
PD_HOST_DEVICE float most_entropy_gathered(float dropped_mass, int64_t n_vocab) {
    // Below the last threshold there may be some mass too.
    const float dropped = fminf(0.5f, fmaxf(dropped_mass, threshold(kThresholds - 1) * n_vocab));
    const float of_parts = -dropped * logf(dropped) - (1.0f - dropped) * logf(1.0f - dropped);
    return logf(kMaxGathered) + dropped * logf(static_cast<float>(n_vocab)) + of_parts + 0.01f;
}

// Parameters of a row's truncated softmax.
struct Distribution {
    float maximum;
    float scale;      // scale_of(temperature)
    float norm;       // 1 / sum of 2^z; NaN if the row is invalid, so that NaN propagates
    float threshold;  // smaller probabilities become 0
};

PD_HOST_DEVICE Distribution distribution_of(const Sums& sums, float scale) {
    return {sums.maximum, scale, is_valid(sums) ? 1.0f / sums.weight : NAN, 0.0f};
}

PD_HOST_DEVICE float probability(const Distribution& d, float x) {
    const float p = power(exponent(x, d.maximum, d.scale)) * d.norm;
    return p < d.threshold ? 0.0f : p;
}

// Whether a threshold with so much mass below it may be chosen: with at most `bound`, or the last one.
PD_HOST_DEVICE bool may_choose(int i, double below, float bound) {
    return i == kThresholds - 1 || (bound > 0.0f && below <= static_cast<double>(bound));
}

}  // namespace pydiffusion::row
