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

}  // namespace pydiffusion
