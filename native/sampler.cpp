#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "vector_math.h"

namespace pydiffusion {

namespace {

constexpr int64_t kLanes = 64;    // independent accumulators, so that sums vectorize in a fixed order
constexpr int64_t kBlock = 2048;  // logits per partial sum: a draw looks at the sums, then at one block

struct Extent {
    float maximum;
    bool sound;  // no NaN, no +infinity, and not all -infinity, which alone is a token that can't be
};

// The maximum of a block, and whether it has neither NaN nor +infinity.
Extent find_block_extent(const float* x, int64_t n) {
    constexpr float largest = std::numeric_limits<float>::max();
    float lanes[kLanes];
    int32_t unsound[kLanes] = {};
    std::fill(lanes, lanes + kLanes, -std::numeric_limits<float>::infinity());
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) {
            lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
            unsound[l] |= !(x[i + l] <= largest);
        }
    }
    for (; i < n; ++i) {
        lanes[0] = std::max(lanes[0], x[i]);
        unsound[0] |= !(x[i] <= largest);
    }
    return {*std::max_element(lanes, lanes + kLanes),
            std::all_of(unsound, unsound + kLanes, [](int32_t u) { return !u; })};
}

// Of a row, whose blocks `prepare(block, n)` may change once they have been found sound.
template <typename Row, typename Prepare>
Extent find_extent(Row* x, int64_t n, const Prepare& prepare) {
    Extent extent = {-std::numeric_limits<float>::infinity(), true};
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        Row* block = x + begin;
        const int64_t n_block = std::min(kBlock, n - begin);
        const Extent found = find_block_extent(block, n_block);
        if (!found.sound) return {found.maximum, false};
        extent.maximum = std::max(extent.maximum, prepare(block, n_block, found.maximum));
    }
    extent.sound = extent.maximum >= -std::numeric_limits<float>::max();
    return extent;
}

Extent find_extent(const float* x, int64_t n) {
    return find_extent(x, n, [](const float*, int64_t, float maximum) { return maximum; });
}

struct BlockSums {
    double weight;    // sum of exp(z)
    double weighted;  // sum of exp(z) * z
};

// Over z = (x - maximum) / temperature, which below -100 adds nothing to either sum.
BlockSums sum_block(const float* x, int64_t n, float maximum, float inverse_temperature) {
    float weight[kLanes] = {}, weighted[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) {
            const float scaled = (x[i + l] - maximum) * inverse_temperature;
            const float z = scaled > -100.0f ? scaled : -100.0f;
            const float e = vector_exp(z);
            weight[l] += e;
            weighted[l] += e * z;
        }
    }
    BlockSums sums = {0.0, 0.0};
    for (int64_t l = 0; l < kLanes; ++l) {
        sums.weight += weight[l];
        sums.weighted += weighted[l];
    }
    for (; i < n; ++i) {
        const float z = std::max(-100.0f, (x[i] - maximum) * inverse_temperature);
        const float e = vector_exp(z);
        sums.weight += e;
        sums.weighted += static_cast<double>(e) * z;
    }
    return sums;
}

// 1 / temperature; temperatures too small to have a finite inverse choose the argmax, as 0 would.
float inverse_temperature_of(float temperature) {
    return std::min(1.0f / temperature, std::numeric_limits<float>::max());
}

}  // namespace

float step_temperature(int32_t step, int32_t n_steps, float t_min, float t_max) {
    return t_min + (t_max - t_min) * (static_cast<float>(step) / static_cast<float>(n_steps));
}

namespace {

Measure measure(const float* logits, int64_t n_vocab, const Extent& extent, float temperature, float u) {
    if (!extent.sound) return {0, 0, std::numeric_limits<float>::quiet_NaN()};
    const float maximum = extent.maximum;
    const float inverse = inverse_temperature_of(temperature);
    const int64_t n_blocks = (n_vocab + kBlock - 1) / kBlock;
    std::vector<double> weights(n_blocks);
    double weight = 0.0, weighted = 0.0;
    for (int64_t b = 0; b < n_blocks; ++b) {
        const int64_t begin = b * kBlock;
        const BlockSums sums = sum_block(logits + begin, std::min(kBlock, n_vocab - begin), maximum, inverse);
        weights[b] = sums.weight;
        weight += sums.weight;
        weighted += sums.weighted;
    }

    Measure result;
    result.argmax = static_cast<int32_t>(std::find(logits, logits + n_vocab, maximum) - logits);
    result.entropy = std::max(0.0f, static_cast<float>(std::log(weight) - weighted / weight));

    // The first token whose cumulative weight exceeds u * total; rounding may leave none, then the last with
    // mass.
    // u = 0 stands for all below 2^-24: at exactly 0 even a token without mass would do (exp never gives 0
    // here).
    double target = std::max(static_cast<double>(u), 0x1p-25) * weight;
    int64_t block = 0;
    while (block + 1 < n_blocks && target >= weights[block]) target -= weights[block++];
    const int64_t begin = block * kBlock, end = std::min(begin + kBlock, n_vocab);
    int64_t chosen = end - 1;
    for (int64_t i = begin; i < end; ++i) {
        target -= vector_exp((logits[i] - maximum) * inverse);
        if (target < 0.0) {
            chosen = i;
            break;
        }
    }
    result.sampled = static_cast<int32_t>(chosen);
    return result;
}

}  // namespace

Measure measure_row(const float* logits, int64_t n_vocab, float temperature, float u) {
    return measure(logits, n_vocab, find_extent(logits, n_vocab), temperature, u);
}

Measure cap_and_measure_row(float* logits, int64_t n_vocab, float cap, float temperature, float u) {
    // Sound blocks only: capping would hide what is not finite, for tanh(NaN) comes out as a number here.
    const float inverse = 1.0f / cap;
    const Extent extent = find_extent(logits, n_vocab, [=](float* block, int64_t n, float) {
        for (int64_t i = 0; i < n; ++i) block[i] = cap * vector_tanh(block[i] * inverse);
        return find_block_extent(block, n).maximum;
    });
    return measure(logits, n_vocab, extent, temperature, u);
}

void softmax_row(float* logits, int64_t n_vocab, float temperature) {
    const auto [maximum, sound] = find_extent(logits, n_vocab);
    if (!sound) {
        std::fill_n(logits, n_vocab, std::numeric_limits<float>::quiet_NaN());
        return;
    }
    const float inverse = inverse_temperature_of(temperature);
    double total = 0.0;
    for (int64_t begin = 0; begin < n_vocab; begin += kBlock) {
        total += sum_block(logits + begin, std::min(kBlock, n_vocab - begin), maximum, inverse).weight;
    }
    const float scale = static_cast<float>(1.0 / total);
    for (int64_t i = 0; i < n_vocab; ++i) {
        const float p = vector_exp((logits[i] - maximum) * inverse) * scale;
        logits[i] = p < 1e-13f ? 0.0f : p;
    }
}

std::vector<uint8_t> accept(const float* entropy, size_t n, float bound) {
    std::vector<size_t> order(n);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [entropy](size_t a, size_t b) { return entropy[a] < entropy[b]; });
    std::vector<uint8_t> accepted(n, 0);
    double running = 0.0;
    for (const size_t i : order) {
        if (!(running <= bound)) break;
        accepted[i] = 1;
        running += entropy[i];
    }
    return accepted;
}

void largest(const float* logits, int64_t n_vocab, int32_t k, int32_t* tokens) {
    // A heap with the least of the best on top: nearly all logits fail one comparison with it.
    const auto better = [logits](int32_t a, int32_t b) {
        return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    };
    std::iota(tokens, tokens + k, 0);
    std::make_heap(tokens, tokens + k, better);
    for (int64_t i = k; i < n_vocab; ++i) {
        if (!(logits[i] > logits[tokens[0]])) continue;
        std::pop_heap(tokens, tokens + k, better);
        tokens[k - 1] = static_cast<int32_t>(i);
        std::push_heap(tokens, tokens + k, better);
    }
    std::sort_heap(tokens, tokens + k, better);
}

Draw random_draw(uint64_t seed, uint32_t canvas, uint32_t step, uint32_t position, int32_t n_vocab) {
    uint32_t c[4] = {position, step, canvas, 0};
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
        const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(b),
                                  static_cast<uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(a)};
        std::copy(next, next + 4, c);
        key[0] += 0x9E3779B9;
        key[1] += 0xBB67AE85;
    }
    return {static_cast<float>(c[0] >> 8) * 0x1p-24f,
            static_cast<int32_t>((uint64_t{c[1]} * static_cast<uint64_t>(n_vocab)) >> 32)};
}

}  // namespace pydiffusion
