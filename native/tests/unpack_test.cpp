// Weights and activations as tiles of bfloat16: the layout, and the values against ggml's own.
#include "backend/cpu/amx/unpack.h"

#include <algorithm>
#include <cmath>

#include "backend/cpu/amx/pack.h"
#include "quantized.h"
#include "tile_checks.h"
#include "util/aligned_buffer.h"

namespace pydiffusion {
namespace testing {

using namespace gemm;

namespace {

bool has_vectors() { return has_kernel("avx512-bf16"); }

// Weight k of row r in tiles that are `depth` deep.
uint16_t weight_at(const uint16_t* tiles, int64_t depth, int64_t r, int64_t k) {
    return tiles[(r / 16 * depth + k / 32) * 512 + r % 16 * 32 + k % 32];
}

}  // namespace

TEST_CASE("which types become tiles") {
    if (!has_vectors()) return;
    const std::vector<ggml_type> expected = unpackable_types();
    for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
        const auto type = static_cast<ggml_type>(t);
        if (ggml_blck_size(type) == 0) continue;
        CAPTURE(ggml_type_name(type));
        CHECK(can_unpack(type, 512) == (std::count(expected.begin(), expected.end(), type) == 1));
        CHECK(can_unpack(type, 48) == (type == GGML_TYPE_BF16));  // of others only whole tiles
    }
}

TEST_CASE("unpacked weights are ggml's, rounded to bfloat16") {
    if (!has_vectors()) return;
    constexpr int64_t n_per_row = 768;
    for (const ggml_type type : unpackable_types()) {
        for (const int64_t n_rows : {1, 15, 16, 17, 31, 32}) {
            CAPTURE(ggml_type_name(type));
            CAPTURE(n_rows);
            const QuantizedRows weights(type, n_rows, n_per_row, 1);
            const struct {
                int64_t first, n;
            } ranges[] = {{0, 256}, {256, 512}, {512, 256}};
            for (const auto& range : ranges) {
                const int64_t depth = range.n / 32;
                const auto tiles = allocate<uint16_t>(2 * depth * kTileElements);
                std::fill_n(tiles.get(), 2 * depth * kTileElements, uint16_t{0x7fc0});
                unpack({type, reinterpret_cast<const char*>(weights.bytes.data()), weights.row_bytes, n_rows,
                        range.first, range.n},
                       tiles.get(), {});
                int64_t n_wrong = 0, n_not_zero = 0;
                for (int64_t r = 0; r < (n_rows + 15) / 16 * 16; ++r) {
                    const float* row = weights.dequantized.data() + r * n_per_row;
                    float largest = 0.0f;
                    for (int64_t k = 0; k < n_per_row && r < n_rows; ++k)
                        largest = std::max(largest, std::fabs(row[k]));
                    for (int64_t k = 0; k < range.n; ++k) {
                        const float found = float_of(weight_at(tiles.get(), depth, r, k));
                        if (r >= n_rows) {
                            n_not_zero += found != 0.0f;
                            continue;
                        }
                        // Half a unit in the last of 8 bits, and float32's rounding of scale times value
                        // minus minimum.
                        const float expected = row[range.first + k];
                        n_wrong += !(std::fabs(found - expected) <=
                                     std::fabs(expected) * 0x1p-8f + largest * 0x1p-20f);
                    }
                }
                CHECK(n_wrong == 0);
                CHECK(n_not_zero == 0);
            }
        }
    }
}

TEST_CASE("packed activations: pairs of values side by side, missing activations zero") {
    if (!has_vectors()) return;
    constexpr int64_t n = 96;
    const std::vector<float> values = random_values(16 * n, 2, 3.0f);
    for (const int64_t n_activations : {1, 15, 16}) {
        CAPTURE(n_activations);
        const float* activations[kTileRows] = {};
        for (int64_t c = 0; c < n_activations; ++c) activations[c] = values.data() + c * n;
        const auto tiles = allocate<uint16_t>(n / 32 * kTileElements);
        pack_activations(activations, n, tiles.get());
        int64_t n_wrong = 0;
        for (int64_t c = 0; c < 16; ++c) {
            for (int64_t k = 0; k < n; ++k) {
                const uint16_t expected = c < n_activations ? bfloat16_of(values[c * n + k]) : 0;
                n_wrong += tiles[k / 32 * 512 + k % 32 / 2 * 32 + 2 * c + k % 2] != expected;
            }
        }
        CHECK(n_wrong == 0);
    }
}

TEST_CASE("a value as the sum of two of bfloat16") {
    if (!has_vectors()) return;
    const std::vector<float> values = random_values(32, 3, 100.0f);
    uint16_t high[32], low[32];
    split(values.data(), 0xffff7ffe, high, low);
    for (int i = 0; i < 32; ++i) {
        CAPTURE(i);
        if (i == 0 || i == 15) {  // not valid
            CHECK(high[i] == 0);
            CHECK(low[i] == 0);
            continue;
        }
        CHECK(high[i] == bfloat16_of(values[i]));
        CHECK(std::fabs(float_of(high[i]) + float_of(low[i]) - values[i]) <= 0x1p-16f * std::fabs(values[i]));
    }
}

TEST_CASE("accumulators become rows of a result") {
    if (!has_vectors()) return;
    alignas(64) float tile[256];
    for (int i = 0; i < 256; ++i) tile[i] = static_cast<float>(i);  // row r, activation c: 16 r + c
    for (const int64_t n_rows : {1, 15, 16}) {
        for (const int64_t n_activations : {1, 16}) {
            std::vector<float> result(16 * 20, -1.0f);
            float* targets[kTileRows];
            for (int64_t c = 0; c < 16; ++c) targets[c] = result.data() + 20 * c;
            store_tile(tile, n_rows, targets, n_activations);
            int64_t n_wrong = 0;
            for (int64_t c = 0; c < 16; ++c) {
                for (int64_t r = 0; r < 20; ++r) {
                    const bool written = c < n_activations && r < n_rows;
                    n_wrong += result[20 * c + r] != (written ? static_cast<float>(16 * r + c) : -1.0f);
                }
            }
            CHECK(n_wrong == 0);
        }
    }
}

}  // namespace testing
}  // namespace pydiffusion
