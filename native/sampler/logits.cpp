#include "sampler/logits.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "util/simd_math.h"

namespace pydiffusion {

namespace {

constexpr int64_t kLanes = 64;          // independent accumulators, so that sums vectorize in a fixed order
constexpr int64_t kChunk = 256;         // logits that are checked, then capped, at a time
constexpr int64_t kBlock = 2048;        // logits per partial sum; they fit in L1
constexpr int64_t kFloatsPerLine = 16;  // cache line
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// --- capping ---

int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// Bits of the largest magnitude: as integers, floats compare in order, infinity and NaN last.
int32_t largest_magnitude(const float* x, int64_t n) {
    int32_t lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) {
            const int32_t magnitude = bits_of(x[i + l]) & 0x7fffffff;
            lanes[l] = magnitude > lanes[l] ? magnitude : lanes[l];
        }
    }
    for (; i < n; ++i) lanes[0] = std::max(lanes[0], bits_of(x[i]) & 0x7fffffff);
    return *std::max_element(lanes, lanes + kLanes);
}

// Whether there is no NaN and no +infinity; -infinity is a masked token.
bool is_valid(const float* x, int64_t n, int32_t magnitude) {
    return magnitude < bits_of(kInfinity) ||
           std::all_of(x, x + n, [](float logit) { return logit < kInfinity; });
}

// x = cap * tanh(x / cap); false if x has a NaN or +infinity, which capping would hide.
bool cap_block(float* block, int64_t n_block, float cap) {
    const float inverse = 1.0f / cap;
    for (int64_t begin = 0; begin < n_block; begin += kChunk) {
        float* x = block + begin;
        const int64_t n = std::min(kChunk, n_block - begin);
        const int32_t magnitude = largest_magnitude(x, n);
        if (magnitude <= bits_of(cap)) {
            for (int64_t i = 0; i < n; ++i) x[i] = cap * small_tanh(x[i] * inverse);
            continue;
        }
        if (!is_valid(x, n, magnitude)) return false;
        for (int64_t i = 0; i < n; ++i) {
            // Chosen per logit, so that equal logits stay equal whatever their neighbours are.
            const float y = x[i] * inverse, exact = vector_tanh(y);
            x[i] = cap * (std::fabs(x[i]) <= cap ? small_tanh(y) : exact);
        }
    }
    return true;
}

// --- sums ---

float find_maximum(const float* x, int64_t n) {
    float lanes[kLanes];
    std::fill(lanes, lanes + kLanes, -kInfinity);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
    }
    for (; i < n; ++i) lanes[0] = std::max(lanes[0], x[i]);
    return *std::max_element(lanes, lanes + kLanes);
}

// 1 / temperature; temperatures with an infinite inverse act like 0, which gives the argmax.
float inverse_temperature_of(float temperature) {
    return std::min(1.0f / temperature, std::numeric_limits<float>::max() / 2);
}

// Where normal floats end; smaller powers of 2 count as 0.
constexpr float kLeastExponent = -126.0f;

// log2 of exp((x - maximum) / temperature); `scale` is log2(e) / temperature.
inline float exponent_of(float x, float maximum, float scale) {
    const float exponent = (x - maximum) * scale;
    return exponent > kLeastExponent ? exponent : kLeastExponent;
}

struct BlockSums {
    float maximum;
    double weight;    // sum of exp(z) over z = (x - maximum) / temperature
    double weighted;  // sum of exp(z) * z
};

// `ahead` points to the next n logits, which are prefetched: memory is slower than the sums.
BlockSums sum_block(const float* x, int64_t n, float scale, const float* ahead) {
    const float maximum = find_maximum(x, n);
    if (maximum == -kInfinity) return {maximum, 0.0, 0.0};
    float weight[kLanes] = {}, weighted[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int64_t l = 0; l < kLanes; l += kFloatsPerLine) prefetch(ahead + i + l);
        for (int64_t l = 0; l < kLanes; ++l) {
            const float exponent = exponent_of(x[i + l], maximum, scale);
            const float e = small_exp2(exponent);
            weight[l] += e;
            weighted[l] += e * exponent;
        }
    }
    for (; i < n; ++i) {
        const float exponent = exponent_of(x[i], maximum, scale), e = small_exp2(exponent);
        weight[0] += e;
        weighted[0] += e * exponent;
    }
    BlockSums sums = {maximum, 0.0, 0.0};
    for (int64_t l = 0; l < kLanes; ++l) {
        sums.weight += weight[l];
        sums.weighted += weighted[l];
    }
    sums.weighted *= kLn2;
    return sums;
}

// Sums over a row.
struct RowSums {
    float maximum = -kInfinity;
    double weight = 0.0, weighted = 0.0;  // as in BlockSums, relative to the row's maximum
    std::vector<BlockSums> blocks;        // `weight` is relative to the row's maximum too
};

// `prepare(block, n)` may change a block before it is summed, and returns false if the block has a NaN or
// +infinity. Returns nothing for a row that has one, or that is -infinity throughout.
template <typename Row, typename Prepare>
std::optional<RowSums> sum_row(Row* logits, int64_t n_vocab, float temperature, const Prepare& prepare) {
    const float inverse = inverse_temperature_of(temperature), scale = inverse * static_cast<float>(kLog2E);
    RowSums row;
    for (int64_t begin = 0; begin < n_vocab; begin += kBlock) {
        const int64_t n = std::min(kBlock, n_vocab - begin);
        if (!prepare(logits + begin, n)) return std::nullopt;
        row.blocks.push_back(sum_block(logits + begin, n, scale, logits + std::min(begin + n, n_vocab - n)));
        row.maximum = std::max(row.maximum, row.blocks.back().maximum);
    }
    if (row.maximum == -kInfinity) return std::nullopt;
    for (BlockSums& block : row.blocks) {
        const double z = (static_cast<double>(block.maximum) - row.maximum) * inverse, factor = std::exp(z);
        if (factor == 0.0) block.weight = 0.0;
        if (block.weight == 0.0) continue;
        block.weight *= factor;
        row.weight += block.weight;
        row.weighted += factor * block.weighted + z * block.weight;
    }
    return row;
}

bool check_block(const float* x, int64_t n) { return is_valid(x, n, largest_magnitude(x, n)); }

int32_t find_argmax(const float* logits, int64_t n_vocab, const RowSums& row) {
    const auto block = std::find_if(row.blocks.begin(), row.blocks.end(),
                                    [&](const BlockSums& b) { return b.maximum == row.maximum; });
    const float* begin = logits + (block - row.blocks.begin()) * kBlock;
    return static_cast<int32_t>(std::find(begin, logits + n_vocab, row.maximum) - logits);
}

// The first token whose cumulative weight exceeds u * total; if rounding leaves none, the last with mass.
int32_t draw(const float* logits, int64_t n_vocab, const RowSums& row, float temperature, float u) {
    // u = 0 stands for [0, 2^-24): at exactly 0, a token without mass could be drawn.
    double target = std::max(static_cast<double>(u), 0x1p-25) * row.weight;
    const int64_t n_blocks = static_cast<int64_t>(row.blocks.size());
    int64_t block = 0;
    for (int64_t b = 0; b < n_blocks; ++b) {
        if (row.blocks[b].weight == 0.0) continue;
        block = b;
        if (target < row.blocks[b].weight) break;
        target -= row.blocks[b].weight;
    }
    const float scale = inverse_temperature_of(temperature) * static_cast<float>(kLog2E);
    int64_t chosen = block * kBlock;
    for (int64_t i = block * kBlock; i < std::min((block + 1) * kBlock, n_vocab); ++i) {
        const float exponent = exponent_of(logits[i], row.maximum, scale);
        if (exponent == kLeastExponent) continue;
        chosen = i;
        target -= small_exp2(exponent);
        if (target < 0.0) break;
    }
    return static_cast<int32_t>(chosen);
}

Measure measure(const float* logits, int64_t n_vocab, const std::optional<RowSums>& row, float temperature,
                float u) {
    if (!row) return {0, 0, std::numeric_limits<float>::quiet_NaN()};
    Measure result;
    result.argmax = find_argmax(logits, n_vocab, *row);
    result.entropy = std::max(0.0f, static_cast<float>(std::log(row->weight) - row->weighted / row->weight));
    result.sampled = draw(logits, n_vocab, *row, temperature, u);
    return result;
}

}  // namespace

Measure measure_row(const float* logits, int64_t n_vocab, float temperature, float u) {
    return measure(logits, n_vocab, sum_row(logits, n_vocab, temperature, check_block), temperature, u);
}

Measure cap_and_measure_row(float* logits, int64_t n_vocab, float cap, float temperature, float u,
                            Normalizer* normalizer) {
    const auto row = sum_row(logits, n_vocab, temperature,
                             [cap](float* block, int64_t n) { return cap_block(block, n, cap); });
    if (normalizer) *normalizer = row ? Normalizer{temperature, row->maximum, row->weight} : Normalizer{};
    return measure(logits, n_vocab, row, temperature, u);
}

void softmax_row(float* logits, int64_t n_vocab, float temperature, const Normalizer& known) {
    Normalizer normalizer = known;
    if (known.temperature != temperature || known.weight == 0.0) {
        const auto row = sum_row(static_cast<const float*>(logits), n_vocab, temperature, check_block);
        if (!row) {
            std::fill_n(logits, n_vocab, std::numeric_limits<float>::quiet_NaN());
            return;
        }
        normalizer = {temperature, row->maximum, row->weight};
    }
    const float scale = inverse_temperature_of(temperature) * static_cast<float>(kLog2E);
    const float inverse_weight = static_cast<float>(1.0 / normalizer.weight), maximum = normalizer.maximum;
    for (int64_t i = 0; i < n_vocab; ++i) {
        const float p = small_exp2(exponent_of(logits[i], maximum, scale)) * inverse_weight;
        logits[i] = p < 1e-13f ? 0.0f : p;
    }
}

void top_k(const float* logits, int64_t n_vocab, int32_t k, int32_t* tokens) {
    // A min-heap of the best so far: nearly all logits fail one comparison with its top.
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

void add_candidates(Candidates& candidates, const float* logits, int64_t n_vocab, int32_t k,
                    const std::vector<int32_t>& extra) {
    const size_t first = candidates.tokens.size();
    candidates.tokens.resize(first + k);
    top_k(logits, n_vocab, k, candidates.tokens.data() + first);
    for (int32_t i = 0; i < k; ++i) candidates.logits.push_back(logits[candidates.tokens[first + i]]);
    for (const int32_t token : extra) candidates.extra.push_back(logits[token]);
}

}  // namespace pydiffusion
