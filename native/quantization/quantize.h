// Quantization and dequantization of rows, with checks for non-finite weights and error sums.
#pragma once

#include <cstdint>

#include "ggml.h"

namespace pydiffusion {

// Quantizes n_rows rows of n_per_row floats to `out` (n_rows * ggml_row_size bytes) on n_threads threads.
// `importance` (n_per_row column weights) may be null. Throws Error(argument) if the type can't be written,
// if n_per_row is not a multiple of its block size, or if the type requires an importance and none is given.
void quantize_rows(ggml_type type, const float* rows, int64_t n_rows, int64_t n_per_row,
                   const float* importance, int n_threads, void* out);

// Dequantizes rows; throws Error(argument) if the type can't be read.
void dequantize_rows(ggml_type type, const void* data, int64_t n_rows, int64_t n_per_row, float* out);

// Converts rows from one type to another on the calling thread, in chunks that fit its cache. Stops at the
// first non-finite weight and returns its index, with the rest of `out` untouched; -1 if all are finite.
// keeps_nonfinite skips that check. Throws like the two above.
int64_t convert_rows(ggml_type source, const void* data, ggml_type target, int64_t n_rows, int64_t n_per_row,
                     const float* importance, bool keeps_nonfinite, void* out);

// Index of the first non-finite weight, or -1. Throws like dequantize_rows.
int64_t find_nonfinite(ggml_type type, const void* data, int64_t n_rows, int64_t n_per_row);

// Per row: sum of squares of `rows`, and sum of squared differences between `data` and `rows`. Throws like
// dequantize_rows.
void row_errors(ggml_type type, const void* data, const float* rows, int64_t n_rows, int64_t n_per_row,
                double* squares, double* errors);

}  // namespace pydiffusion
