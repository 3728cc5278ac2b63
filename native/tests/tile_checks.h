// Checks of one kernel of the tile GEMM, and of what unpacks and packs for it.
#pragma once

#include <string>

#include "backend/cpu/amx/tile_gemm.h"

namespace pydiffusion {
namespace testing {

// Whether this CPU has the kernel. Where it lacks it, a message says so, and with the environment variable
// PYDIFFUSION_REQUIRE_AMX=1 the test fails (every CPU with AMX has AVX-512 BF16).
bool has_kernel(const std::string& name);

// tile_gemm() on bfloat16 tiles, against sums in double precision.
void check_tile_gemm(gemm::Kernel kernel);

// Whole matmuls by this kernel: every type of weights, odd sizes, experts, several threads.
void check_matmuls(gemm::Kernel kernel);
void check_expert_matmuls(gemm::Kernel kernel);
void check_independence(gemm::Kernel kernel);

}  // namespace testing
}  // namespace pydiffusion
