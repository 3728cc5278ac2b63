// The tile GEMM with AMX, and what only AMX computes. Skipped on a CPU without it; with
// PYDIFFUSION_REQUIRE_AMX=1 that is a failure.
#include <algorithm>
#include <cmath>

#include "backend/cpu/amx/pack.h"
#include "backend/cpu/amx/weighted_sums.h"
#include "quantized.h"
#include "support.h"
#include "tile_checks.h"

namespace pydiffusion {
namespace testing {

namespace {

constexpr auto kKernel = gemm::Kernel::amx;

bool is_there() { return has_kernel("amx"); }

}  // namespace

TEST_CASE("AMX: tiles") {
    if (is_there()) check_tile_gemm(kKernel);
}

TEST_CASE("AMX: matmuls of every type") {
    if (is_there()) check_matmuls(kKernel);
}

TEST_CASE("AMX: matmuls by expert") {
    if (is_there()) check_expert_matmuls(kKernel);
}

TEST_CASE("AMX: a result depends on its own activation only") {
    if (is_there()) check_independence(kKernel);
}

// 16 rows of weights and 16 activations of one tile's depth, each value as the sum of two of bfloat16.
TEST_CASE("AMX: tiles of split values") {
    if (!is_there()) return;
    constexpr int64_t n = gemm::kTileElements;
    const std::vector<float> weights = random_values(n, 1), activations = random_values(n, 2);
    const auto w = gemm::allocate<uint16_t>(2 * n), a = gemm::allocate<uint16_t>(2 * n);
    const auto found = gemm::allocate<float>(gemm::kAccumulatorElements);
    for (int64_t i = 0; i < n; i += 32) {  // in the order of the tile's own memory
        gemm::split(weights.data() + i, 0xffffffff, w.get() + i, w.get() + n + i);
        gemm::split(activations.data() + i, 0xffffffff, a.get() + i, a.get() + n + i);
    }
    {
        const gemm::KernelScope ready(kKernel);
        gemm::tile_gemm_split({w.get(), 2 * n, a.get(), 2 * n, found.get()}, {n, n}, 1, 1, 1, false);
    }
    int n_wrong = 0;
    for (int64_t row = 0; row < 16; ++row) {
        for (int64_t c = 0; c < 16; ++c) {
            double sum = 0.0, magnitude = 0.0;
            for (int64_t k = 0; k < 32; ++k) {
                const double term =
                    static_cast<double>(weights[32 * row + k]) * activations[k / 2 * 32 + 2 * c + k % 2];
                sum += term;
                magnitude += std::fabs(term);
            }
            n_wrong += !(std::fabs(found[16 * row + c] - sum) <= 0x1p-15 * magnitude);
        }
    }
    CHECK(n_wrong == 0);
}

TEST_CASE("AMX: weighted sums of embedding rows") {
    if (!is_there()) return;
    constexpr int64_t n_rows = 300, n_tokens = 19;
    const std::pair<ggml_type, int64_t> cases[] = {
        {GGML_TYPE_Q8_0, 256}, {GGML_TYPE_Q8_0, 512}, {GGML_TYPE_BF16, 48}, {GGML_TYPE_BF16, 272}};
    for (const auto& [type, n_embd] : cases) {
        CAPTURE(ggml_type_name(type));
        CAPTURE(n_embd);
        const QuantizedRows embedding(type, n_rows, n_embd, 3);
        std::vector<float> p = random_values(n_tokens * n_rows, 4);
        std::transform(p.begin(), p.end(), p.begin(), [](float x) { return std::fabs(x) / n_rows; });
        std::vector<float> found(n_tokens * n_embd, 1.0f);
        {
            const gemm::KernelScope ready(kKernel);
            gemm::WeightedSums sums(n_tokens);
            for (int64_t first = 0; first < n_rows; first += gemm::kSoftRows) {
                std::vector<const float*> of_token;
                for (int64_t t = 0; t < n_tokens; ++t) of_token.push_back(p.data() + t * n_rows + first);
                const auto* rows = reinterpret_cast<const char*>(embedding.bytes.data()) +
                                   first * static_cast<int64_t>(embedding.row_bytes);
                sums.add(of_token.data(), n_tokens,
                         {embedding.type, rows, embedding.row_bytes,
                          std::min(gemm::kSoftRows, n_rows - first), 0, n_embd});
            }
            for (int64_t t = 0; t < n_tokens; ++t) sums.add_to(found.data() + t * n_embd, t, n_embd);
        }
        int n_wrong = 0;
        for (int64_t t = 0; t < n_tokens; ++t) {
            for (int64_t i = 0; i < n_embd; ++i) {
                double sum = 1.0, magnitude = 1.0;
                for (int64_t r = 0; r < n_rows; ++r) {
                    const double term = static_cast<double>(p[t * n_rows + r]) *
                                        float_of(bfloat16_of(embedding.dequantized[r * n_embd + i]));
                    sum += term;
                    magnitude += std::fabs(term);
                }
                n_wrong += !(std::fabs(found[t * n_embd + i] - sum) <= 5e-5 * magnitude);
            }
        }
        CHECK(n_wrong == 0);
    }
}

}  // namespace testing
}  // namespace pydiffusion
