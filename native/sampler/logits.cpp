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

constexpr int64_t kLanes = 64;    // independent accumulators, so that sums vectorize in a fixed order
constexpr int64_t kPiece = 256;   // logits that are looked at before they are capped
constexpr int64_t kBlock = 2048;  // logits per partial sum: the first cache holds them meanwhile
constexpr int64_t kLine = 16;     // floats that memory gives at a time
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// --- capping ---

int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// The bits of the largest magnitude: taken as whole numbers, floats come in order, infinity and NaN last.
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

// No NaN and no +infinity; -infinity is a token that can't be.
bool has_no_nonfinite(const float* x, int64_t n, int32_t magnitude) {
    return magnitude < bits_of(kInfinity) ||
           std::all_of(x, x + n, [](float logit) { return logit < kInfinity; });
}

// x = cap * tanh(x / cap); false where x is not sound, which capping would hide.
bool cap_block(float* block, int64_t n_block, float cap) {
    const float inverse = 1.0f / cap;
    for (int64_t begin = 0; begin < n_block; begin += kPiece) {
        float* x = block + begin;
        const int64_t n = std::min(kPiece, n_block - begin);
        const int32_t magnitude = largest_magnitude(x, n);
        if (magnitude <= bits_of(cap)) {
            for (int64_t i = 0; i < n; ++i) x[i] = cap * small_tanh(x[i] * inverse);
            continue;
        }
        if (!has_no_nonfinite(x, n, magnitude)) return false;
        for (int64_t i = 0; i < n; ++i) {
            // The choice is each logit's own: equal ones stay equal, whatever lies beside them.
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

// 1 / temperature; temperatures too small to have a finite inverse choose the argmax, as 0 would.
float inverse_temperature_of(float temperature) {
    return std::min(1.0f / temperature, std::numeric_limits<float>::max() / 2);
}

// Below it 2^x is as good as nothing, and float ends.
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

// `ahead` is what will be read next, as many: fetched meanwhile, for memory is slower than the sums are.
BlockSums sum_block(const float* x, int64_t n, float scale, const float* ahead) {
    const float maximum = find_maximum(x, n);
    if (maximum == -kInfinity) return {maximum, 0.0, 0.0};
    float weight[kLanes] = {}, weighted[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int64_t l = 0; l < kLanes; l += kLine) fetch_ahead(ahead + i + l);
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

// A row's distribution, from its blocks.
struct RowSums {
    float maximum = -kInfinity;
    double weight = 0.0, weighted = 0.0;  // as the blocks', over the row's maximum
    std::vector<BlockSums> blocks;        // their weights over the row's maximum too
};

// `prepare(block, n)` may change a block before it is looked at, and tells whether it is sound. Nothing is
// returned for a row that is not sound or has only tokens that can't be.
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

bool sound(const float* x, int64_t n) { return has_no_nonfinite(x, n, largest_magnitude(x, n)); }

int32_t find_argmax(const float* logits, int64_t n_vocab, const RowSums& row) {
    const auto block = std::find_if(row.blocks.begin(), row.blocks.end(),
                                    [&](const BlockSums& b) { return b.maximum == row.maximum; });
    const float* begin = logits + (block - row.blocks.begin()) * kBlock;
    return static_cast<int32_t>(std::find(begin, logits + n_vocab, row.maximum) - logits);
}

// The first token whose cumulative weight exceeds u * total; where rounding leaves none, the last with mass.
int32_t draw(const float* logits, int64_t n_vocab, const RowSums& row, float temperature, float u) {
    // u = 0 stands for all below 2^-24: at exactly 0 even a token without mass would do.
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
    return measure(logits, n_vocab, sum_row(logits, n_vocab, temperature, sound), temperature, u);
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
        const auto row = sum_row(static_cast<const float*>(logits), n_vocab, temperature, sound);
        if (!row) {
            std::fill_n(logits, n_vocab, std::numeric_limits<float>::quiet_NaN());
            return;
        }
        normalizer = {temperature, row->maximum, row->weight};
    }
    const float scale = inverse_temperature_of(temperature) * static_cast<float>(kLog2E);
    const float share = static_cast<float>(1.0 / normalizer.weight), maximum = normalizer.maximum;
    for (int64_t i = 0; i < n_vocab; ++i) {
        const float p = small_exp2(exponent_of(logits[i], maximum, scale)) * share;
        logits[i] = p < 1e-13f ? 0.0f : p;
    }
}

void top_k(const float* logits, int64_t n_vocab, int32_t k, int32_t* tokens) {
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

}  // namespace pydiffusion
