#include "backend/cpu/amx/weighted_sums.h"

#include <algorithm>

#include "backend/cpu/amx/intrinsics.h"
#include "backend/cpu/amx/pack.h"

namespace pydiffusion {
namespace gemm {

namespace {

constexpr int64_t kDepth = kSoftRows / kTileDepth;
constexpr int64_t kDimTiles = kSoftDims / kTileRows;
constexpr int64_t kPairElements =
    2 * kDimTiles * kAccumulatorElements;  // accumulators of two tiles of tokens

}  // namespace

#if defined(PYDIFFUSION_AMX)

namespace {

// Interleaves two rows of 32 elements: pairs of the first 16 dims to `left`, of the others to `right`.
TARGET_AVX512 void interleave(const uint16_t* even, const uint16_t* odd, uint16_t* left, uint16_t* right) {
    alignas(64) static const uint16_t order[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                   37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                   11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    const __m512i first = _mm512_load_si512(order);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    _mm512_storeu_si512(left, _mm512_permutex2var_epi16(a, first, b));
    _mm512_storeu_si512(right, _mm512_permutex2var_epi16(a, second, b));
}

}  // namespace

WeightedSums::WeightedSums(int64_t n_tokens)
    : n_tiles_((n_tokens + 2 * kTileRows - 1) / (2 * kTileRows) * 2),
      tokens_(allocate<uint16_t>(2 * n_tiles_ * kDepth * kTileElements)),
      rows_(allocate<uint16_t>(kTileDepth * kSoftDims)),
      dims_(allocate<uint16_t>(kDimTiles * kDepth * kTileElements)),
      accumulators_(allocate<float>(n_tiles_ / 2 * kPairElements)) {}

void WeightedSums::add(const float* const* p, int64_t n_tokens, const Rows& rows) {
    const int64_t depth = (rows.n_rows + kTileDepth - 1) / kTileDepth;
    const int64_t n_half = n_tiles_ * depth * kTileElements;
    for (int64_t t = 0; t < n_tiles_ * kTileRows; ++t) {
        const int64_t at = t / kTileRows * depth * kTileElements + t % kTileRows * kTileDepth;
        for (int64_t d = 0; d < depth; ++d) {
            const int64_t n_left = t < n_tokens ? rows.n_rows - d * kTileDepth : 0;
            const uint32_t valid = n_left >= kTileDepth ? ~uint32_t{0} : (uint32_t{1} << n_left) - 1;
            uint16_t* high = &tokens_[at + d * kTileElements];
            split(p[std::min(t, n_tokens - 1)] + d * kTileDepth, valid, high, high + n_half);
        }
    }
    const int64_t n_blocks = depth_of(rows.n);
    for (int64_t d = 0; d < depth; ++d) {
        const int64_t n_rows = std::min(kTileDepth, rows.n_rows - d * kTileDepth);
        if (n_rows < kTileDepth) std::fill_n(rows_.get(), kTileDepth * kSoftDims, uint16_t{0});
        Rows block = rows;
        block.data += d * kTileDepth * rows.row_bytes;
        block.n_rows = n_rows;
        const char* next = block.data + n_rows * rows.row_bytes + ggml_row_size(rows.type, rows.first);
        unpack(block, rows_.get(), {next, rows.row_bytes, ggml_row_size(rows.type, rows.n)});
        for (int64_t b = 0; b < n_blocks; ++b) {
            uint16_t* left = &dims_[(2 * b * depth + d) * kTileElements];
            for (int64_t r = 0; r < kTileDepth; r += 2) {
                const uint16_t* even =
                    &rows_[((r / kTileRows * n_blocks + b) * kTileRows + r % kTileRows) * kTileDepth];
                interleave(even, even + kTileDepth, left + r / 2 * kTileDepth,
                           left + depth * kTileElements + r / 2 * kTileDepth);
            }
        }
    }
    for (int64_t t = 0; t < n_tiles_; t += 2) {
        const int64_t stride = depth * kTileElements;
        float* accumulators = &accumulators_[t / 2 * kPairElements];
        tile_gemm_split({&tokens_[t * stride], stride, dims_.get(), stride, accumulators}, {n_half, 0}, 2,
                        2 * n_blocks, depth, !empty_);
    }
    empty_ = false;
}

void WeightedSums::add_to(float* out, int64_t t, int64_t n) const {
    if (empty_) return;
    const float* sums = &accumulators_[t / (2 * kTileRows) * kPairElements +
                                       t / kTileRows % 2 * kAccumulatorElements + t % kTileRows * kTileRows];
    for (int64_t c = 0; c < n; ++c) out[c] += sums[c / kTileRows * 2 * kAccumulatorElements + c % kTileRows];
}

#else

WeightedSums::WeightedSums(int64_t) : n_tiles_(0) {}
void WeightedSums::add(const float* const*, int64_t, const Rows&) {}
void WeightedSums::add_to(float*, int64_t, int64_t) const {}

#endif

}  // namespace gemm
}  // namespace pydiffusion
