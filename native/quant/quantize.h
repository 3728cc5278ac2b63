// Rows in, blocks out.
#pragma once

#include <cstdint>

#include "ggml.h"

namespace pydiffusion {

// Quantizes n_rows rows of n_per_row floats into out (n_rows * ggml_row_size bytes), over n_threads threads.
// `importance` (n_per_row weights of the columns) may be null. Throws Error(argument) for a type that can't
// be written, rows that are no multiple of its block, or a type that needs an importance without one.
void quantize_rows(ggml_type type, const float* rows, int64_t n_rows, int64_t n_per_row,
                   const float* importance, int n_threads, void* out);

// The other way; throws Error(argument) for a type that can't be read.
void dequantize_rows(ggml_type type, const void* data, int64_t n_rows, int64_t n_per_row, float* out);

// Rows of one type as rows of another, on the calling thread, in pieces that stay in its cache. Returns the
// index of the first weight that is not finite, where it stops and leaves the rest of `out` as it was, or
// -1; with keeps_nonfinite it does not look. Throws as the two above.
int64_t convert_rows(ggml_type source, const void* data, ggml_type target, int64_t n_rows, int64_t n_per_row,
                     const float* importance, bool keeps_nonfinite, void* out);

// The index of the first weight that is not finite, or -1. Throws as dequantize_rows.
int64_t find_nonfinite(ggml_type type, const void* data, int64_t n_rows, int64_t n_per_row);

// For each row, the sum of squares of `rows` and of what `data` differs from them. Throws as dequantize_rows.
void row_errors(ggml_type type, const void* data, const float* rows, int64_t n_rows, int64_t n_per_row,
                double* squares, double* errors);

}  // namespace pydiffusion
