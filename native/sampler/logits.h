// One row of logits: soft-capped, measured, drawn from, made probabilities.
#pragma once

#include <cstdint>

namespace pydiffusion {

// What the host needs to know of one position's distribution softmax(logits / temperature).
struct Measure {
    int32_t argmax;   // the first of equal maxima
    int32_t sampled;  // inverse CDF in vocabulary order at u
    float entropy;    // nats; NaN when a logit is NaN or +infinity, or all are -infinity
};

// What turns logits into probabilities: exp((x - maximum) / temperature) / weight.
struct Normalizer {
    float temperature = 0.0f;
    float maximum = 0.0f;
    double weight = 0.0;  // 0: nothing is known
};

// `u` in [0, 1). Goes through the row once, in blocks that stay in the first cache for maximum, sum and
// entropy, and through one block again for the draw.
Measure measure_row(const float* logits, int64_t n_vocab, float temperature, float u);

// The same after capping the row in place: x = cap * tanh(x / cap). Tells what softmax_row can use.
Measure cap_and_measure_row(float* logits, int64_t n_vocab, float cap, float temperature, float u,
                            Normalizer* normalizer = nullptr);

// Turns logits / temperature into probabilities in place. Those below 1e-13 become exactly 0: all of a
// vocabulary of 262,144 together then weigh less than half a unit in the last place of 1.0f. Unsound logits
// give NaN. `known` spares a pass where it is of the same temperature.
void softmax_row(float* logits, int64_t n_vocab, float temperature, const Normalizer& known = {});

// The tokens of the k largest logits into `tokens` [k], largest first; of equal ones the first in the
// vocabulary.
void top_k(const float* logits, int64_t n_vocab, int32_t k, int32_t* tokens);

}  // namespace pydiffusion
