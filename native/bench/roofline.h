// Roofline of this machine: measured memory bandwidth and matmul throughput, to compare benchmarks with.
#pragma once

#include "backend/backend.h"

namespace pydiffusion {

// Bytes per second that all threads together read from memory (256 MiB, best of three), or that a
// device-to-device copy reads and writes. device: see Backend.
double measure_read_rate(int n_threads, const std::string& device);

// FLOP/s of a matmul of a 4096 x 4096 matrix of `type` with 256 activations (best of three), computed as in a
// model's step. kernels: see Backend.
double measure_matrix_rate(int n_threads, ggml_type type, const std::string& device,
                           const std::string& kernels);

}  // namespace pydiffusion
