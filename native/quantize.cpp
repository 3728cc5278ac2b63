#include "quantize.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "errors.h"

namespace pydiffusion {

namespace {

constexpr int64_t kRowsPerTask = 16;

void check_rows(ggml_type type, int64_t n_per_row) {
    const int64_t block = ggml_blck_size(type);
    if (n_per_row < 1 || n_per_row % block != 0) {
        throw Error(
            ErrorKind::argument,
            format("rows of %lld are no multiple of the %lld weights of a %s block",
                   static_cast<long long>(n_per_row), static_cast<long long>(block), ggml_type_name(type)));
    }
}

}  // namespace

void quantize_rows(ggml_type type, const float* rows, int64_t n_rows, int64_t n_per_row,
                   const float* importance, int n_threads, void* out) {
    check_rows(type, n_per_row);
    const bool is_float = type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
    const bool is_intermediate = type == GGML_TYPE_Q8_1 || type == GGML_TYPE_Q8_K;  // of products only
    if (!is_float && (!ggml_is_quantized(type) || is_intermediate)) {
        throw Error(ErrorKind::argument, format("weights can't be written as %s", ggml_type_name(type)));
    }
    if (ggml_quantize_requires_imatrix(type) && !importance) {
        throw Error(ErrorKind::argument, format("%s needs an importance matrix", ggml_type_name(type)));
    }
    ggml_quantize_init(type);

    const int64_t n_tasks = (n_rows + kRowsPerTask - 1) / kRowsPerTask;
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t task = next++; task < n_tasks; task = next++) {
            const int64_t first = task * kRowsPerTask, n = std::min(kRowsPerTask, n_rows - first);
            ggml_quantize_chunk(type, rows, out, first * n_per_row, n, n_per_row, importance);
        }
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < std::min<int64_t>(n_threads, n_tasks); ++i) threads.emplace_back(work);
    work();
    for (std::thread& thread : threads) thread.join();
}

void dequantize_rows(ggml_type type, const void* data, int64_t n_rows, int64_t n_per_row, float* out) {
    check_rows(type, n_per_row);
    const int64_t n = n_rows * n_per_row;
    const ggml_to_float_t to_float = ggml_get_type_traits(type)->to_float;
    if (type == GGML_TYPE_F32) {
        std::memcpy(out, data, n * sizeof(float));
    } else if (to_float) {
        to_float(data, out, n);
    } else {
        throw Error(ErrorKind::argument,
                    format("weights of type %s can't be read as floats", ggml_type_name(type)));
    }
}

}  // namespace pydiffusion
