#include "tile_checks.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "backend/cpu/matmul.h"
#include "bench/matmul_once.h"
#include "ggml-cpp.h"
#include "quantized.h"
#include "util/aligned_buffer.h"

namespace pydiffusion {
namespace testing {

using namespace gemm;

bool has_kernel(const std::string& name) {
    const std::vector<std::string> names = kernel_names();
    if (std::find(names.begin(), names.end(), name) != names.end()) return true;
    const char* required = std::getenv("PYDIFFUSION_REQUIRE_AMX");
    REQUIRE_MESSAGE((!required || std::string(required) != "1"),
                    "PYDIFFUSION_REQUIRE_AMX is set, and this CPU has no ", name);
    MESSAGE("SKIPPED: this CPU has no ", name);
    return false;
}

namespace {

std::vector<uint16_t> random_bfloat16(size_t n, uint32_t seed) {
    std::vector<uint16_t> bits;
    for (const float value : random_values(n, seed)) bits.push_back(bfloat16_of(value));
    return bits;
}

template <typename T>
AlignedBuffer<T> aligned(const std::vector<T>& values) {
    auto buffer = allocate<T>(static_cast<int64_t>(values.size()));
    std::copy(values.begin(), values.end(), buffer.get());
    return buffer;
}

void check_tile_gemm(Kernel kernel, int64_t n_weights, int64_t n_tiles, int64_t depth, bool add) {
    CAPTURE(n_weights);
    CAPTURE(n_tiles);
    CAPTURE(depth);
    CAPTURE(add);
    const auto weights = random_bfloat16(n_weights * depth * kTileElements, 1);
    const auto activations = random_bfloat16(n_tiles * depth * kTileElements, 2);
    // One tile of weights leaves every second accumulator alone.
    const std::vector<float> before = random_values(n_tiles * 2 * kAccumulatorElements, 3, 10.0f);
    const auto w = aligned(weights), a = aligned(activations);
    const auto accumulators = aligned(before);
    {
        const KernelScope ready(kernel);
        tile_gemm(kernel,
                  {w.get(), depth * kTileElements, a.get(), depth * kTileElements, accumulators.get()},
                  n_weights, n_tiles, depth, add);
    }
    int64_t n_wrong = 0;
    for (int64_t i = 0; i < n_tiles * 2 * kAccumulatorElements; ++i) {
        const int64_t j = i / 512, i_weights = i / 256 % 2, row = i / 16 % 16, c = i % 16;
        if (i_weights >= n_weights) {
            n_wrong += accumulators[i] != before[i];
            continue;
        }
        double sum = add ? before[i] : 0.0, magnitude = std::fabs(sum);
        for (int64_t k = 0; k < depth * 32; ++k) {
            const double term =
                static_cast<double>(
                    float_of(weights[(i_weights * depth + k / 32) * 512 + row * 32 + k % 32])) *
                float_of(activations[(j * depth + k / 32) * 512 + k % 32 / 2 * 32 + 2 * c + k % 2]);
            sum += term;
            magnitude += std::fabs(term);
        }
        n_wrong += !(std::fabs(accumulators[i] - sum) <= 1e-5 * magnitude);
    }
    CHECK(n_wrong == 0);
}

// Tolerance of a matmul, relative to the sum of |weight| times |activation|: float32 sums, and here and there
// a weight whose last bit of bfloat16 differs from that of ggml's value.
constexpr double kTolerance = 5e-5;

struct Reference {
    double sum = 0.0, magnitude = 0.0;
    bool agrees(float found) const { return std::fabs(found - sum) <= kTolerance * magnitude; }
};

Reference dot(const float* weights, const float* x, int64_t n) {
    Reference dot;
    for (int64_t k = 0; k < n; ++k) {
        const double term =
            static_cast<double>(float_of(bfloat16_of(weights[k]))) * float_of(bfloat16_of(x[k]));
        dot.sum += term;
        dot.magnitude += std::fabs(term);
    }
    return dot;
}

MatmulTask task_of(Kernel kernel, const QuantizedRows& weights, const std::vector<float>& x, int n_threads) {
    MatmulTask task;
    task.kernels = name_of(kernel);
    task.n_threads = n_threads;
    task.type = weights.type;
    task.n_inner = weights.n_per_row;
    task.n_rows = weights.n_rows;
    task.n_activations = static_cast<int64_t>(x.size()) / weights.n_per_row;
    task.weights = weights.bytes.data();
    task.x = x.data();
    return task;
}

void check_matmul(Kernel kernel, const QuantizedRows& weights, int64_t n_activations, int n_threads) {
    CAPTURE(ggml_type_name(weights.type));
    CAPTURE(weights.n_per_row);
    CAPTURE(weights.n_rows);
    CAPTURE(n_activations);
    const std::vector<float> x = random_values(n_activations * weights.n_per_row, 5);
    const std::vector<float> found = matmul_once(task_of(kernel, weights, x, n_threads));
    REQUIRE(static_cast<int64_t>(found.size()) == n_activations * weights.n_rows);
    int64_t n_wrong = 0;
    for (int64_t c = 0; c < n_activations; ++c) {
        for (int64_t r = 0; r < weights.n_rows; ++r)
            n_wrong += !dot(weights.dequantized.data() + r * weights.n_per_row,
                            x.data() + c * weights.n_per_row, weights.n_per_row)
                            .agrees(found[c * weights.n_rows + r]);
    }
    CHECK(n_wrong == 0);
}

// That tiles multiply these, and no operation of ggml's.
void check_is_ours(Kernel kernel, ggml_type type) {
    const ggml_context_ptr context(ggml_init({8 * ggml_tensor_overhead(), nullptr, true}));
    Matmul matmul(context.get(), kernel);
    ggml_tensor* weight = ggml_new_tensor_2d(context.get(), type, 512, 33);
    ggml_tensor* x = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, 512, 1);
    const ggml_tensor* result = matmul.apply(weight, x);
    CHECK(result->op == GGML_OP_CUSTOM);
    CHECK(matmul_operands(result).weight == weight);
    CHECK(matmul_operands(result).x == x);
}

}  // namespace

void check_tile_gemm(Kernel kernel) {
    for (const int64_t n_weights : {1, 2}) {
        for (const int64_t n_tiles : {1, 2, 3, 5}) {
            for (const int64_t depth : {1, 3, 8}) {
                check_tile_gemm(kernel, n_weights, n_tiles, depth, false);
                check_tile_gemm(kernel, n_weights, n_tiles, depth, true);
            }
        }
    }
}

void check_matmuls(Kernel kernel) {
    for (const ggml_type type : unpackable_types()) {
        check_is_ours(kernel, type);
        for (const int64_t n_rows : {1, 15, 33, 80}) {
            const QuantizedRows weights(type, n_rows, 512, 4);
            for (const int64_t n_activations : {1, 15, 16, 17})
                check_matmul(kernel, weights, n_activations, 1);
        }
        check_matmul(kernel, QuantizedRows(type, 47, 768, 4), 100, 2);
    }
    // Rows of no whole 256, and more activations than are multiplied at a time.
    check_matmul(kernel, QuantizedRows(GGML_TYPE_Q8_0, 47, 288, 6), 17, 1);
    check_matmul(kernel, QuantizedRows(GGML_TYPE_BF16, 17, 32, 6), 1030, 2);
}

void check_expert_matmuls(Kernel kernel) {
    constexpr int64_t n_inner = 256, n_rows = 33, n_experts = 5, n_used = 2, n_tokens = 37;
    const QuantizedRows weights(GGML_TYPE_Q4_K, n_rows * n_experts, n_inner, 7);
    const std::vector<float> x = random_values(n_tokens * n_inner, 8);
    std::vector<int32_t> experts;  // 0 gets every token, 1 none, the others some
    for (int32_t t = 0; t < n_tokens; ++t) {
        experts.push_back(t % 2 ? 0 : 2 + t % 3);
        experts.push_back(t % 2 ? 2 + t % 3 : 0);
    }
    for (const int n_threads : {1, 3}) {
        MatmulTask task = task_of(kernel, weights, x, n_threads);
        task.experts = experts.data();
        task.n_experts = n_experts;
        task.n_used = n_used;
        const std::vector<float> found = matmul_once(task);
        REQUIRE(found.size() == static_cast<size_t>(n_tokens * n_used * n_rows));
        int64_t n_wrong = 0;
        for (size_t i = 0; i < found.size(); ++i) {
            const auto place = static_cast<int64_t>(i) / n_rows;
            const int64_t row = experts[place] * n_rows + static_cast<int64_t>(i) % n_rows;
            n_wrong +=
                !dot(weights.dequantized.data() + row * n_inner, x.data() + place / n_used * n_inner, n_inner)
                     .agrees(found[i]);
        }
        CHECK(n_wrong == 0);
    }
}

void check_independence(Kernel kernel) {
    const QuantizedRows weights(GGML_TYPE_Q6_K, 47, 512, 9);
    const std::vector<float> x = random_values(100 * 512, 10);
    const std::vector<float> all = matmul_once(task_of(kernel, weights, x, 2));
    for (const int64_t n : {1, 16, 17}) {
        CAPTURE(n);
        const std::vector<float> some =
            matmul_once(task_of(kernel, weights, {x.begin(), x.begin() + n * 512}, 1));
        CHECK(std::equal(some.begin(), some.end(), all.begin()));
    }
}

}  // namespace testing
}  // namespace pydiffusion
