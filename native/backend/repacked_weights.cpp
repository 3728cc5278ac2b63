#include "backend/repacked_weights.h"

#include <algorithm>
#include <cstring>

#include "util/block_sizes.h"

namespace pydiffusion {

namespace {

constexpr int64_t kValues = kSuperBlockWeights;  // of a row's chunk

// 64 bytes of a fragment, for the four lanes of a g: word i of each line, for i from 0 to 3.
inline void transpose(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, uint8_t* out) {
    uint32_t lines[4][4], words[4][4];
    std::memcpy(lines[0], a, 16);
    std::memcpy(lines[1], b, 16);
    std::memcpy(lines[2], c, 16);
    std::memcpy(lines[3], d, 16);
    for (int i = 0; i < 4; ++i) {
        for (int line = 0; line < 4; ++line) words[i][line] = lines[line][i];
    }
    std::memcpy(out, words, sizeof words);
}

// Each repacks a piece: `chunk` is the first row's, rows are row_bytes apart.
void repack_q4(const uint8_t* chunk, int64_t row_bytes, uint8_t* out) {
    uint8_t* heads = out + kRepackedRows * 128;
    for (int64_t row = 0; row < kRepackedRows; ++row)
        std::memcpy(heads + 16 * row, chunk + row * row_bytes, 16);
    for (int64_t first = 0; first < kRepackedRows; first += 16, out += 4 * 512) {
        for (int64_t g = 0; g < 8; ++g) {
            const uint8_t* low = chunk + (first + g) * row_bytes + 16;
            const uint8_t* high = low + 8 * row_bytes;
            for (int unit = 0; unit < 4; ++unit, low += 32, high += 32)
                transpose(low, low + 16, high, high + 16, out + 512 * unit + 64 * g);
        }
    }
}

void repack_q6(const uint8_t* chunk, int64_t row_bytes, uint8_t* out) {
    uint8_t* heads = out + kRepackedRows * 192;
    for (int64_t row = 0; row < kRepackedRows; ++row) {
        std::memcpy(heads + 16 * row, chunk + row * row_bytes + 192, 16);
        std::memcpy(heads + 16 * kRepackedRows + 2 * row, chunk + row * row_bytes + 208, 2);
    }
    for (int64_t first = 0; first < kRepackedRows; first += 16, out += 6 * 512) {
        for (int64_t g = 0; g < 8; ++g) {
            const uint8_t* low = chunk + (first + g) * row_bytes;
            const uint8_t* high = low + 8 * row_bytes;
            for (int half = 0; half < 2; ++half) {
                uint8_t* to = out + 3 * 512 * half + 64 * g;
                const uint8_t *l = low + 64 * half, *h = high + 64 * half;
                transpose(l, l + 16, l + 32, l + 48, to);
                transpose(h, h + 16, h + 32, h + 48, to + 512);
                l = low + 128 + 32 * half;
                h = high + 128 + 32 * half;
                transpose(l, l + 16, h, h + 16, to + 1024);
            }
        }
    }
}

void repack_q8(const uint8_t* chunk, int64_t row_bytes, int64_t n_blocks, uint8_t* out) {
    uint8_t* heads = out + kRepackedRows * kBlockWeights * n_blocks;
    for (int64_t row = 0; row < kRepackedRows; ++row) {
        for (int64_t i = 0; i < n_blocks; ++i)
            std::memcpy(heads + 2 * (row * n_blocks + i), chunk + row * row_bytes + i * kQ8_0Bytes, 2);
    }
    for (int64_t first = 0; first < kRepackedRows; first += 16, out += 512 * n_blocks) {
        for (int64_t g = 0; g < 8; ++g) {
            const uint8_t* low = chunk + (first + g) * row_bytes + 2;
            const uint8_t* high = low + 8 * row_bytes;
            for (int64_t i = 0; i < n_blocks; ++i, low += kQ8_0Bytes, high += kQ8_0Bytes)
                transpose(low, low + 16, high, high + 16, out + 512 * i + 64 * g);
        }
    }
}

}  // namespace

bool can_repack(ggml_type type, int64_t n_rows, int64_t n_values) {
    if (n_rows % kRepackedRows) return false;
    if (type == GGML_TYPE_Q8_0) return n_values % kBlockWeights == 0;
    return (type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q6_K) && n_values % kValues == 0;
}

namespace {
char repacked_mark;
}

void mark_repacked(ggml_tensor* tensor) { tensor->extra = &repacked_mark; }

bool is_repacked(const ggml_tensor* tensor) { return tensor->extra == &repacked_mark; }

void repack_rows(ggml_type type, const uint8_t* rows, int64_t n_rows, int64_t n_values, uint8_t* out) {
    const int64_t row_bytes = static_cast<int64_t>(ggml_row_size(type, n_values));
    for (int64_t first = 0; first < n_rows; first += kRepackedRows, rows += kRepackedRows * row_bytes) {
        const uint8_t* chunk = rows;
        for (int64_t i = 0; i < n_values; i += kValues) {
            int64_t chunk_bytes = kQ4KBytes;
            if (type == GGML_TYPE_Q4_K) {
                repack_q4(chunk, row_bytes, out);
            } else if (type == GGML_TYPE_Q6_K) {
                chunk_bytes = kQ6KBytes;
                repack_q6(chunk, row_bytes, out);
            } else {
                const int64_t n_blocks = std::min(kValues, n_values - i) / kBlockWeights;
                chunk_bytes = n_blocks * kQ8_0Bytes;
                repack_q8(chunk, row_bytes, n_blocks, out);
            }
            chunk += chunk_bytes;
            out += kRepackedRows * chunk_bytes;
        }
    }
}

}  // namespace pydiffusion
