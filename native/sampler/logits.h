// Operations on one row of logits: soft cap, argmax, sampling, entropy, softmax, top-k.
#pragma once

#include <cstdint>
#include <vector>

namespace pydiffusion {

// Summary of one position's distribution softmax(logits / temperature).
struct Measure {
    int32_t argmax;   // the first of equal maxima
    int32_t sampled;  // inverse CDF in vocabulary order at u
    float entropy;    // nats; NaN when a logit is NaN or +infinity, or all are -infinity
};

// Softmax parameters of a row: p = exp((x - maximum) / temperature) / weight.
struct Normalizer {
    float temperature = 0.0f;
    float maximum = 0.0f;
    double weight = 0.0;  // 0: unknown
};

// `u` in [0, 1). Reads the row once, in blocks that stay in L1 for maximum, sum and entropy, and one block
// again for the draw.
Measure measure_row(const float* logits, int64_t n_vocab, float temperature, float u);

// The same after soft-capping the row in place: x = cap * tanh(x / cap). `normalizer` is for softmax_row.
Measure cap_and_measure_row(float* logits, int64_t n_vocab, float cap, float temperature, float u,
                            Normalizer* normalizer = nullptr);

// softmax(logits / temperature) in place. Probabilities below 1e-13 become exactly 0: a whole vocabulary of
// 262,144 of them sums to less than half an ulp of 1.0f. Non-finite logits (see Measure) give NaN. `known`
// saves a pass if it has the same temperature.
void softmax_row(float* logits, int64_t n_vocab, float temperature, const Normalizer& known = {});

// Writes the tokens of the k largest logits to `tokens` [k], largest first; ties are in vocabulary order.
void top_k(const float* logits, int64_t n_vocab, int32_t k, int32_t* tokens);

// Of each position: the k tokens of the largest logits, largest first, and their logits, [n * k] each; and
// the logits of extra tokens that are asked for, [n * n_extra].
struct Candidates {
    std::vector<int32_t> tokens;
    std::vector<float> logits, extra;
};
void add_candidates(Candidates& candidates, const float* logits, int64_t n_vocab, int32_t k,
                    const std::vector<int32_t>& extra);

}  // namespace pydiffusion
