// What this machine can do at best, measured: the figures that a benchmark's results stand beside.
#pragma once

#include "backend/backend.h"

namespace pydiffusion {

// Bytes per second that the threads together read from memory (256 MB, best of three), or that a copy within
// the device's memory reads and writes. device: see Backend.
double measure_read_rate(int n_threads, const std::string& device);

// Operations per second of the product of a 4096 x 4096 matrix of `type` with 256 activations (best of
// three), as a model's steps would make it. kernels: see Backend.
double measure_matrix_rate(int n_threads, ggml_type type, const std::string& device,
                           const std::string& kernels);

}  // namespace pydiffusion
