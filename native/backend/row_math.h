// The arithmetic of one row of logits as GPUs do it: a row is cut into kWarps ranges, a range among kLanes
// lanes, and what the lanes found is merged. One source for CUDA's compiler and, for tests, the host's.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PD_BOTH __host__ __device__ __forceinline__
#else
#define PD_BOTH inline
#endif

namespace pydiffusion::row {

constexpr int kLanes = 32, kWarps = 32;
constexpr int kThreads = kLanes * kWarps;  // one block a row

// The tokens [begin, end) of a row that one warp owns; lane l takes begin + l, begin + l + kLanes, ...
struct Range {
    int64_t begin, end;
};

PD_BOTH Range range_of(int warp, int64_t n_vocab) {
    const int64_t per_warp = (n_vocab + kThreads - 1) / kThreads * kLanes;
    const int64_t begin = warp * per_warp < n_vocab ? warp * per_warp : n_vocab;
    const int64_t end = begin + per_warp < n_vocab ? begin + per_warp : n_vocab;
    return {begin, end};
}

PD_BOTH float inverse_temperature(float temperature) {
    const float inverse = 1.0f / temperature;
    return inverse < FLT_MAX ? inverse : FLT_MAX;
}

// (x - maximum) / temperature, which below -100 adds nothing to any sum.
PD_BOTH float scaled(float x, float maximum, float inverse) {
    const float z = (x - maximum) * inverse;
    return z > -100.0f ? z : -100.0f;
}

// cap * tanh(x / cap), and NaN for what is not finite, which capping would hide.
PD_BOTH float capped(float x, float cap) { return x <= FLT_MAX ? cap * tanhf(x / cap) : NAN; }

// What is known of some of a row's logits: the largest, and the sums over exp((x - maximum) / temperature).
struct Sums {
    float maximum;
    int32_t argmax;         // the first of equal maxima; -1: no logit above -infinity yet
    float weight;           // sum of exp(z)
    float weighted;         // sum of exp(z) * z
    int32_t has_nonfinite;  // a NaN or +infinity was among them
};

PD_BOTH Sums no_sums() { return {-FLT_MAX, -1, 0.0f, 0.0f, 0}; }

// Sums relative to another, larger maximum.
PD_BOTH void rescale(Sums& s, float maximum, float inverse) {
    const float shift = scaled(s.maximum, maximum, inverse), factor = expf(shift);
    s.weighted = factor * (s.weighted + shift * s.weight);
    s.weight *= factor;
    s.maximum = maximum;
}

PD_BOTH void add(Sums& s, float x, int32_t token, float inverse) {
    if (!(x <= FLT_MAX)) s.has_nonfinite = 1;
    if (!(x >= -FLT_MAX)) return;  // a token that can't be
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

PD_BOTH Sums merged(Sums a, Sums b, float inverse) {
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

// --- what self-conditioning keeps of a row ---

// Of the probabilities those of at least a threshold are kept. The thresholds that are tried, largest first;
// below the last, a whole vocabulary weighs less than half a unit in the last place of 1.0f.
constexpr int kThresholds = 8;

PD_BOTH float threshold(int i) {
    const float values[kThresholds] = {1e-4f, 1e-5f, 1e-6f, 1e-7f, 1e-8f, 1e-9f, 1e-10f, 1e-13f};
    return values[i];
}

// Per threshold: the mass below it, and how many probabilities are not.
struct Tails {
    float below[kThresholds];
    int32_t kept[kThresholds];
};

PD_BOTH void add(Tails& tails, float p) {
    for (int i = 0; i < kThresholds; ++i) {
        const bool keep = p >= threshold(i);
        tails.below[i] += keep ? 0.0f : p;
        tails.kept[i] += keep ? 1 : 0;
    }
}

// The largest threshold below which at most `bound` lies; the last one leaves out nothing that counts.
PD_BOTH int choose_threshold(const double* below, float bound) {
    for (int i = 0; i + 1 < kThresholds; ++i) {
        if (bound > 0.0f && below[i] <= static_cast<double>(bound)) return i;
    }
    return kThresholds - 1;
}

// A row's distribution, once it is known.
struct Distribution {
    float maximum;
    float scale;      // 1 / sum of exp; NaN for has_nonfinite logits, which then spoil all that follows
    float inverse;    // of the temperature
    float threshold;  // probabilities below it are left out
};

PD_BOTH float probability(const Distribution& d, float x) {
    if (!(x >= -FLT_MAX)) return x == x ? 0.0f : x;
    const float p = expf(scaled(x, d.maximum, d.inverse)) * d.scale;
    return p < d.threshold ? 0.0f : p;
}

}  // namespace pydiffusion::row
