// Activations as pack_rows() and gated matmuls write them, read back.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "backend/cuda/expert_slots.cuh"

namespace pydiffusion {
namespace testing {

// A row's values, of whole chunks, and its sums of 16.
struct PackedRow {
    std::vector<double> values, sums;
};

// Where value i of a chunk is.
inline int place_of(cuda::PackOrder pack_order, int i) {
    if (pack_order == cuda::PackOrder::quads)  // pairs (0, 2), (1, 3) of four
        return i / 32 * 64 + 16 * (i / 4 % 4) + 8 * (i / 16 % 2) + 4 * (i % 2) + i % 4 / 2 * 2;
    return i / 16 * 32 + i % 2 * 16 + i % 16 / 2 * 2;
}

inline std::vector<PackedRow> unpacked(cuda::PackOrder pack_order, const unsigned char* rows,
                                       const float* scales, int32_t n_rows, int32_t n_chunks) {
    using namespace cuda;
    std::vector<PackedRow> result(n_rows);
    for (int32_t r = 0; r < n_rows; ++r) {
        for (int32_t i = 0; i < n_chunks * kChunk; ++i) {
            const unsigned char* chunk = rows + (int64_t{r} * n_chunks + i / kChunk) * kXChunkBytes;
            const int in = i % kChunk;
            const auto value_at = [&](int offset) {
                uint16_t bits;
                std::memcpy(&bits, chunk + offset, 2);
                return static_cast<double>(half_to_float(bits)) * scales[r];
            };
            result[r].values.push_back(value_at(place_of(pack_order, in)));
            const int sums = 2 * kChunk + in / 16 * 2;
            if (in % 16 == 0) result[r].sums.push_back(value_at(sums) + value_at(sums + 2 * kSixteens));
        }
    }
    return result;
}

// Whether sum i is that of its 16 values, but for the rounding of both halves, whose last bit is at least
// `smallest`.
inline bool is_sum_right(const PackedRow& row, size_t i, double smallest) {
    double sum = 0.0, size = 0.0;
    for (size_t j = 16 * i; j < 16 * i + 16; ++j) {
        sum += row.values[j];
        size += std::fabs(row.values[j]);
    }
    return std::fabs(row.sums[i] - sum) <= size * 0x1p-20 + smallest / 2;
}

}  // namespace testing
}  // namespace pydiffusion
