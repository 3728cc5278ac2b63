#include "backend/repacked_weights.h"

#include <algorithm>

#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

// Where byte `at` of a row's chunk of n_blocks blocks is in its piece, as the header says it; `row` of the
// group.
int64_t place_of(ggml_type type, int64_t row, int64_t at, int64_t n_blocks) {
    const int64_t quarter = row / 16, g = row % 8, high = row / 8 % 2;
    // A byte of a line: `fragment` of n, the line's number for row g (row g + 8: + n_lines).
    const auto in_fragment = [&](int64_t fragment, int64_t n, int64_t line, int64_t byte) {
        return (quarter * n + fragment) * 512 + (4 * g + byte / 4) * 16 + 4 * line + byte % 4;
    };
    if (type == GGML_TYPE_Q4_K) {
        if (at < 16) return 64 * 128 + 16 * row + at;
        at -= 16;
        return in_fragment(at / 32, 4, at / 16 % 2 + 2 * high, at % 16);
    }
    if (type == GGML_TYPE_Q6_K) {
        if (at < 128) return in_fragment(3 * (at / 64) + high, 6, at / 16 % 4, at % 16);
        if (at < 192) return in_fragment(3 * ((at - 128) / 32) + 2, 6, at / 16 % 2 + 2 * high, at % 16);
        if (at < 208) return 64 * 192 + 16 * row + at - 192;
        return 64 * 208 + 2 * row + at - 208;
    }
    const int64_t block = at / 34, in_block = at % 34;
    if (in_block < 2) return 64 * 32 * n_blocks + 2 * (row * n_blocks + block) + in_block;
    return in_fragment(block, n_blocks, (in_block - 2) / 16 + 2 * high, (in_block - 2) % 16);
}

std::vector<uint8_t> repacked_naively(ggml_type type, const std::vector<uint8_t>& rows, int64_t n_rows,
                                      int64_t n_values) {
    std::vector<uint8_t> out(rows.size());
    const int64_t row_bytes = static_cast<int64_t>(ggml_row_size(type, n_values));
    const int64_t chunk_bytes = static_cast<int64_t>(ggml_row_size(type, 256));
    for (int64_t row = 0; row < n_rows; ++row) {
        for (int64_t i = 0; i < row_bytes; ++i) {
            const int64_t chunk = i / chunk_bytes, left = row_bytes - chunk * chunk_bytes;
            const int64_t piece = row / 64 * 64 * row_bytes + chunk * 64 * chunk_bytes;
            out[piece + place_of(type, row % 64, i % chunk_bytes, std::min(left, chunk_bytes) / 34)] =
                rows[row * row_bytes + i];
        }
    }
    return out;
}

}  // namespace

TEST_CASE("repacked weights: every byte is where the layout says") {
    const struct {
        ggml_type type;
        int64_t n_rows, n_values;
    } cases[] = {{GGML_TYPE_Q4_K, 128, 768},
                 {GGML_TYPE_Q6_K, 128, 512},
                 {GGML_TYPE_Q8_0, 64, 704},
                 {GGML_TYPE_Q8_0, 128, 512},
                 {GGML_TYPE_Q8_0, 64, 32}};
    for (const auto& c : cases) {
        CAPTURE(ggml_type_name(c.type));
        CAPTURE(c.n_values);
        CHECK(can_repack(c.type, c.n_rows, c.n_values));
        std::vector<uint8_t> rows(ggml_row_size(c.type, c.n_values) * c.n_rows), out(rows.size());
        std::mt19937 generator(3);
        for (uint8_t& byte : rows) byte = static_cast<uint8_t>(generator());
        repack_rows(c.type, rows.data(), c.n_rows, c.n_values, out.data());
        CHECK(out == repacked_naively(c.type, rows, c.n_rows, c.n_values));
    }
}

TEST_CASE("repacked weights: other types and shapes stay as they are") {
    CHECK_FALSE(can_repack(GGML_TYPE_Q4_K, 96, 256));
    CHECK_FALSE(can_repack(GGML_TYPE_Q4_K, 64, 128));
    CHECK_FALSE(can_repack(GGML_TYPE_Q5_K, 64, 256));
    CHECK_FALSE(can_repack(GGML_TYPE_BF16, 64, 256));
}

}  // namespace testing
}  // namespace pydiffusion
