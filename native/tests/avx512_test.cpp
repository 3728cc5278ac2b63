// The tile GEMM with AVX-512 BF16.
#include "support.h"
#include "tile_checks.h"

namespace pydiffusion {
namespace testing {

namespace {

constexpr auto kKernel = gemm::Kernel::avx512_bf16;

bool is_there() { return has_kernel("avx512-bf16"); }

}  // namespace

TEST_CASE("AVX-512: tiles") {
    if (is_there()) check_tile_gemm(kKernel);
}

TEST_CASE("AVX-512: matmuls of every type") {
    if (is_there()) check_matmuls(kKernel);
}

TEST_CASE("AVX-512: matmuls by expert") {
    if (is_there()) check_expert_matmuls(kKernel);
}

TEST_CASE("AVX-512: a result depends on its own activation only") {
    if (is_there()) check_independence(kKernel);
}

}  // namespace testing
}  // namespace pydiffusion
