#include "quantization/quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "util/block_sizes.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

constexpr int64_t kRowsPerTask = 16;
// Weights dequantized at a time: 32 KB of floats, still in L1 when they are checked and quantized.
constexpr int64_t kWeightsPerChunk = 8192;

void check_rows(ggml_type type, int64_t n_per_row) {
    const int64_t block = ggml_blck_size(type);
    if (n_per_row < 1 || n_per_row % block != 0) {
        throw Error(
            ErrorKind::argument,
            format("rows of %lld weights are not a multiple of the block size %lld of %s",
                   static_cast<long long>(n_per_row), static_cast<long long>(block), ggml_type_name(type)));
    }
}

// Same bytes as ggml's quantize_row_q8_0_ref, which calls roundf per weight; these loops vectorize and take a
// tenth of the time. `n` is a multiple of 32.
void quantize_q8_0(const float* x, uint8_t* out, int64_t n) {
    constexpr int64_t block = kBlockWeights;
    static_assert(kQ8_0Bytes == sizeof(ggml_fp16_t) + block);
    for (int64_t i = 0; i < n; i += block, x += block) {
        uint32_t largest = 0;  // absolute value; the bits of non-negative floats compare like the floats
        for (int64_t j = 0; j < block; ++j) {
            uint32_t bits;
            std::memcpy(&bits, x + j, sizeof bits);
            largest = std::max(largest, bits & 0x7fffffff);
        }
        float max;
        std::memcpy(&max, &largest, sizeof max);
        const float d = max / 127.0f, inverse = d != 0.0f ? 1.0f / d : 0.0f;
        const ggml_fp16_t d16 = ggml_fp32_to_fp16(d);
        std::memcpy(out, &d16, sizeof d16);
        out += sizeof d16;
        for (int64_t j = 0; j < block; ++j) {
            const float scaled = x[j] * inverse;
            // Round half away from zero, like roundf. The addend is the largest float below 0.5: adding 0.5
            // itself would round values just below a half up.
            const float away = scaled + std::copysign(0.49999997f, scaled);
            out[j] = static_cast<uint8_t>(static_cast<int8_t>(static_cast<int32_t>(away)));
        }
        out += block;
    }
}

void require_writable(ggml_type type, const float* importance) {
    const bool is_float = type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
    const bool is_intermediate = type == GGML_TYPE_Q8_1 || type == GGML_TYPE_Q8_K;  // activations only
    if (!is_float && (!ggml_is_quantized(type) || is_intermediate)) {
        throw Error(ErrorKind::argument,
                    format("quantizing weights to type %s is not supported", ggml_type_name(type)));
    }
    if (ggml_quantize_requires_imatrix(type) && !importance) {
        throw Error(ErrorKind::argument,
                    format("type %s requires an importance matrix", ggml_type_name(type)));
    }
}

void require_readable(ggml_type type) {
    if (type != GGML_TYPE_F32 && !ggml_get_type_traits(type)->to_float) {
        throw Error(ErrorKind::argument,
                    format("dequantizing weights of type %s is not supported", ggml_type_name(type)));
    }
}

// Rows on the calling thread, arguments already checked.
void quantize_chunk(ggml_type type, const float* rows, int64_t n_rows, int64_t n_per_row,
                    const float* importance, uint8_t* out) {
    if (type == GGML_TYPE_Q8_0) {  // ignores importance
        quantize_q8_0(rows, out, n_rows * n_per_row);
    } else {
        ggml_quantize_chunk(type, rows, out, 0, n_rows, n_per_row, importance);
    }
}

// Vectorizes, unlike ggml's conversion. Keeps a NaN's bits like numpy; ggml's arithmetic changes them.
void half_to_floats(const uint8_t* data, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) {
        uint16_t half;
        std::memcpy(&half, data + i * sizeof half, sizeof half);
        const uint32_t magnitude = half & 0x7fffu;
        const uint32_t exponents =
            magnitude >= 0x7c00 ? 224u << 23 : 112u << 23;  // infinity and NaN, or finite
        const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
        uint32_t small;
        std::memcpy(&small, &subnormal, sizeof small);
        const uint32_t sign = (half & 0x8000u) << 16;
        const uint32_t bits = sign | (magnitude < 0x0400 ? small : (magnitude << 13) + exponents);
        std::memcpy(out + i, &bits, sizeof bits);
    }
}

// `n` weights of a readable type, whole blocks.
void to_floats(ggml_type type, const uint8_t* data, int64_t n, float* out) {
    if (type == GGML_TYPE_F32) {
        std::memcpy(out, data, n * sizeof(float));
    } else if (type == GGML_TYPE_F16) {
        half_to_floats(data, n, out);
    } else {
        ggml_get_type_traits(type)->to_float(data, out, n);
    }
}

int64_t first_nonfinite(const float* x, int64_t n) {
    const auto magnitude = [x](int64_t i) {  // compares like the absolute value, with NaN above infinity
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        return bits & 0x7fffffff;
    };
    constexpr uint32_t infinity = 0x7f800000;
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, magnitude(i));
    if (largest < infinity) return -1;
    int64_t i = 0;
    while (magnitude(i) < infinity) ++i;
    return i;
}

// Calls visit(first row, number of rows, their floats) for chunks of a matrix until it returns false.
template <typename Visit>
void for_chunks(ggml_type type, const void* data, int64_t n_rows, int64_t n_per_row, Visit visit) {
    check_rows(type, n_per_row);
    require_readable(type);
    const int64_t step = std::max<int64_t>(1, kWeightsPerChunk / n_per_row);
    std::vector<float> floats(std::min(step, n_rows) * n_per_row);
    const auto* bytes = static_cast<const uint8_t*>(data);
    for (int64_t first = 0; first < n_rows; first += step) {
        const int64_t n = std::min(step, n_rows - first);
        to_floats(type, bytes + first * ggml_row_size(type, n_per_row), n * n_per_row, floats.data());
        if (!visit(first, n, floats.data())) return;
    }
}

}  // namespace

void quantize_rows(ggml_type type, const float* rows, int64_t n_rows, int64_t n_per_row,
                   const float* importance, int n_threads, void* out) {
    check_rows(type, n_per_row);
    require_writable(type, importance);
    ggml_quantize_init(type);

    const int64_t n_tasks = (n_rows + kRowsPerTask - 1) / kRowsPerTask;
    const size_t row_size = ggml_row_size(type, n_per_row);
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t task = next++; task < n_tasks; task = next++) {
            const int64_t first = task * kRowsPerTask, n = std::min(kRowsPerTask, n_rows - first);
            quantize_chunk(type, rows + first * n_per_row, n, n_per_row, importance,
                           static_cast<uint8_t*>(out) + first * row_size);
        }
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < std::min<int64_t>(n_threads, n_tasks); ++i) threads.emplace_back(work);
    work();
    for (std::thread& thread : threads) thread.join();
}

void dequantize_rows(ggml_type type, const void* data, int64_t n_rows, int64_t n_per_row, float* out) {
    check_rows(type, n_per_row);
    require_readable(type);
    to_floats(type, static_cast<const uint8_t*>(data), n_rows * n_per_row, out);
}

int64_t convert_rows(ggml_type source, const void* data, ggml_type target, int64_t n_rows, int64_t n_per_row,
                     const float* importance, bool keeps_nonfinite, void* out) {
    check_rows(target, n_per_row);
    require_writable(target, importance);
    ggml_quantize_init(target);
    const size_t row_size = ggml_row_size(target, n_per_row);
    int64_t found = -1;
    for_chunks(source, data, n_rows, n_per_row, [&](int64_t first, int64_t n, const float* floats) {
        if (!keeps_nonfinite) {
            const int64_t i = first_nonfinite(floats, n * n_per_row);
            if (i >= 0) {
                found = first * n_per_row + i;
                return false;
            }
        }
        quantize_chunk(target, floats, n, n_per_row, importance,
                       static_cast<uint8_t*>(out) + first * row_size);
        return true;
    });
    return found;
}

int64_t find_nonfinite(ggml_type type, const void* data, int64_t n_rows, int64_t n_per_row) {
    int64_t found = -1;
    for_chunks(type, data, n_rows, n_per_row, [&](int64_t first, int64_t n, const float* floats) {
        const int64_t i = first_nonfinite(floats, n * n_per_row);
        if (i >= 0) found = first * n_per_row + i;
        return found < 0;
    });
    return found;
}

void row_errors(ggml_type type, const void* data, const float* rows, int64_t n_rows, int64_t n_per_row,
                double* squares, double* errors) {
    constexpr int64_t n_lanes = 8;  // independent sums, so that the loop vectorizes
    for_chunks(type, data, n_rows, n_per_row, [&](int64_t first, int64_t n, const float* floats) {
        for (int64_t row = first; row < first + n; ++row, floats += n_per_row) {
            const float* expected = rows + row * n_per_row;
            double square[n_lanes] = {}, error[n_lanes] = {};
            int64_t i = 0;
            for (; i + n_lanes <= n_per_row; i += n_lanes) {
                for (int64_t lane = 0; lane < n_lanes; ++lane) {
                    const double weight = expected[i + lane], difference = floats[i + lane] - weight;
                    square[lane] += weight * weight;
                    error[lane] += difference * difference;
                }
            }
            for (; i < n_per_row; ++i) {
                const double weight = expected[i], difference = floats[i] - weight;
                square[0] += weight * weight;
                error[0] += difference * difference;
            }
            squares[row] = std::accumulate(square, square + n_lanes, 0.0);
            errors[row] = std::accumulate(error, error + n_lanes, 0.0);
        }
        return true;
    });
}

}  // namespace pydiffusion
