// Softmax statistics of one row of logits as GPU kernels compute them: kWarps ranges per row, kLanes lanes
// per range, merged in a fixed order. Compiled by nvcc and, for tests, by the host compiler.
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

constexpr int kLanes = 32, kWarps = 32;
constexpr int kThreads = kLanes * kWarps;  // one block per row

// The tokens [begin, end) of a row that one warp owns; lane l reads begin + l, begin + l + kLanes, ...
struct Range {
    int64_t begin, end;
};

PD_HOST_DEVICE Range range_of(int warp, int64_t n_vocab) {
    const int64_t per_warp = (n_vocab + kThreads - 1) / kThreads * kLanes;
    const int64_t begin = warp * per_warp < n_vocab ? warp * per_warp : n_vocab;
    const int64_t end = begin + per_warp < n_vocab ? begin + per_warp : n_vocab;
    return {begin, end};
}

PD_HOST_DEVICE float inverse_temperature(float temperature) {
    const float inverse = 1.0f / temperature;
    return inverse < FLT_MAX ? inverse : FLT_MAX;
}

// (x - maximum) / temperature, clamped to -100: below that exp() adds nothing to any sum.
PD_HOST_DEVICE float scaled(float x, float maximum, float inverse) {
    const float z = (x - maximum) * inverse;
    return z > -100.0f ? z : -100.0f;
}

// cap * tanh(x / cap); NaN and +infinity, which capping would hide, give NaN.
PD_HOST_DEVICE float capped(float x, float cap) { return x <= FLT_MAX ? cap * tanhf(x / cap) : NAN; }

// Partial sums over some of a row's logits, with z = (x - maximum) / temperature.
struct Sums {
    float maximum;
    int32_t argmax;         // the first of equal maxima; -1: none above -infinity yet
    float weight;           // sum of exp(z)
    float weighted;         // sum of exp(z) * z
    int32_t has_nonfinite;  // one of them was NaN or +infinity
};

PD_HOST_DEVICE Sums empty_sums() { return {-FLT_MAX, -1, 0.0f, 0.0f, 0}; }

// Makes the sums relative to another, larger maximum.
PD_HOST_DEVICE void rescale(Sums& s, float maximum, float inverse) {
    const float shift = scaled(s.maximum, maximum, inverse), factor = expf(shift);
    s.weighted = factor * (s.weighted + shift * s.weight);
    s.weight *= factor;
    s.maximum = maximum;
}

PD_HOST_DEVICE void add(Sums& s, float x, int32_t token, float inverse) {
    if (!(x <= FLT_MAX)) s.has_nonfinite = 1;
    if (!(x >= -FLT_MAX)) return;  // -infinity: a masked token
    if (s.argmax < 0 || x > s.maximum) {
        if (s.argmax < 0) {
            s.maximum = x;
        } else {
            rescale(s, x, inverse);
        }
        s.argmax = token;
    }
    const float z = scaled(x, s.maximum, inverse), e = expf(z);
    s.weight += e;
    s.weighted += e * z;
}

PD_HOST_DEVICE Sums merged(Sums a, Sums b, float inverse) {
    const int32_t has_nonfinite = a.has_nonfinite | b.has_nonfinite;
    if (a.argmax < 0 || b.argmax < 0) {
        Sums one = a.argmax < 0 ? b : a;
        one.has_nonfinite = has_nonfinite;
        return one;
    }
    const bool b_leads = b.maximum > a.maximum || (b.maximum == a.maximum && b.argmax < a.argmax);
    const float maximum = b_leads ? b.maximum : a.maximum;
    const int32_t argmax = b_leads ? b.argmax : a.argmax;
    rescale(a, maximum, inverse);
    rescale(b, maximum, inverse);
    return {maximum, argmax, a.weight + b.weight, a.weighted + b.weighted, has_nonfinite};
}

// --- top of the distribution, for self-conditioning ---

// Self-conditioning keeps the probabilities that are at least a threshold. Candidates, largest first; below
// the last one, even a whole vocabulary sums to less than half an ulp of 1.0f.
constexpr int kThresholds = 8;

PD_HOST_DEVICE float threshold(int i) {
    const float values[kThresholds] = {1e-4f, 1e-5f, 1e-6f, 1e-7f, 1e-8f, 1e-9f, 1e-10f, 1e-13f};
    return values[i];
}

// Per threshold: the mass below it, and how many probabilities reach it.
struct Tails {
    float below[kThresholds];
    int32_t kept[kThresholds];
};

PD_HOST_DEVICE void add(Tails& tails, float p) {
    for (int i = 0; i < kThresholds; ++i) {
        const bool keep = p >= threshold(i);
        tails.below[i] += keep ? 0.0f : p;
        tails.kept[i] += keep ? 1 : 0;
    }
}

// Index of the largest threshold with a mass of at most `bound` below it; else of the last threshold.
PD_HOST_DEVICE int choose_threshold(const double* below, float bound) {
    for (int i = 0; i + 1 < kThresholds; ++i) {
        if (bound > 0.0f && below[i] <= static_cast<double>(bound)) return i;
    }
    return kThresholds - 1;
}

// A position that keeps at most this many tokens of its distribution gathers their embeddings; a flatter one
// goes through a dense GEMM with the whole embedding.
constexpr int32_t kMaxGathered = 1024;

// Parameters of a row's truncated softmax.
struct Distribution {
    float maximum;
    float scale;      // 1 / sum of exp(z); NaN if has_nonfinite, so that NaN propagates
    float inverse;    // 1 / temperature
    float threshold;  // smaller probabilities become 0
};

PD_HOST_DEVICE float probability(const Distribution& d, float x) {
    if (!(x >= -FLT_MAX)) return x == x ? 0.0f : x;
    const float p = expf(scaled(x, d.maximum, d.inverse)) * d.scale;
    return p < d.threshold ? 0.0f : p;
}

}  // namespace pydiffusion::row
