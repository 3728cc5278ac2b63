// Low-rank changes of a matmul's results on the CPU, by both kinds of nodes, against double precision.
#include "backend/cpu/low_rank.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "backend/cpu/matmul.h"
#include "backend/graph_executor.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

struct LowRankCase {
    int64_t n_inner, n_rows, rank, n_tokens;
    int64_t first, n;  // tokens that change
    ggml_type type;
};

std::vector<float> rounded(std::vector<float> values, ggml_type type) {
    if (type != GGML_TYPE_BF16) return values;
    for (float& value : values) value = ggml_bf16_to_fp32(ggml_fp32_to_bf16(value));
    return values;
}

// Operands of the case, and results before the change.
struct Operands {
    explicit Operands(const LowRankCase& c)
        : a(rounded(random_values(c.rank * c.n_inner, 1), c.type)),
          b(rounded(random_values(c.n_rows * c.rank, 2), c.type)),
          x(random_values(c.n_tokens * c.n_inner, 3)),
          y(random_values(c.n_tokens * c.n_rows, 4)) {}
    std::vector<float> a, b, x, y;
};

constexpr float kScale = 0.25f;

std::vector<double> reference(const LowRankCase& c, const Operands& o) {
    std::vector<double> result(o.y.begin(), o.y.end());
    for (int64_t t = c.first; t < c.first + c.n; ++t) {
        for (int64_t k = 0; k < c.rank; ++k) {
            double inner = 0;
            for (int64_t i = 0; i < c.n_inner; ++i)
                inner += static_cast<double>(o.a[k * c.n_inner + i]) * o.x[t * c.n_inner + i];
            for (int64_t row = 0; row < c.n_rows; ++row)
                result[t * c.n_rows + row] += kScale * inner * o.b[row * c.rank + k];
        }
    }
    return result;
}

void set(ggml_tensor* tensor, const std::vector<float>& values) {
    if (tensor->type == GGML_TYPE_F32) {
        std::memcpy(tensor->data, values.data(), ggml_nbytes(tensor));
    } else {
        ggml_fp32_to_bf16_row(values.data(), static_cast<ggml_bf16_t*>(tensor->data),
                              static_cast<int64_t>(values.size()));
    }
}

// kernel: ggml for the nodes of float32 sums, else that of our tiles.
std::vector<float> run(const LowRankCase& c, const Operands& o, gemm::Kernel kernel, int n_threads) {
    Backend backend(n_threads, "cpu");
    const ggml_context_ptr inputs(ggml_init({size_t{64} << 20, nullptr, false}));
    const auto input = [&](ggml_type type, int64_t n0, int64_t n1, const std::vector<float>& values) {
        ggml_tensor* tensor = ggml_new_tensor_2d(inputs.get(), type, n0, n1);
        set(tensor, values);
        return tensor;
    };
    const LowRank change = {input(c.type, c.n_inner, c.rank, o.a), input(c.type, c.rank, c.n_rows, o.b),
                            kScale, c.first, c.n};
    ggml_tensor* x = input(GGML_TYPE_F32, c.n_inner, c.n_tokens, o.x);
    ggml_tensor* y = input(GGML_TYPE_F32, c.n_rows, c.n_tokens, o.y);
    const ggml_context_ptr context(ggml_init({size_t{1} << 20, nullptr, true}));
    ggml_cgraph* graph = ggml_new_graph(context.get());
    gemm::Matmul matmul(context.get(), kernel);
    ggml_tensor* result = kernel == gemm::Kernel::ggml ? add_low_rank(context.get(), change, x, y)
                                                       : matmul.add_low_rank(change, x, y);
    ggml_build_forward_expand(graph, result);
    GraphExecutor executor(backend);
    executor.allocate(graph, {}, {}, "the test");
    executor.compute(graph, [] { return false; });
    const auto* values = static_cast<const float*>(y->data);  // in place
    return std::vector<float>(values, values + ggml_nelements(y));
}

const std::vector<LowRankCase>& cases() {
    static const std::vector<LowRankCase> all = {
        {256, 64, 16, 32, 0, 32, GGML_TYPE_BF16},  {320, 100, 5, 37, 0, 37, GGML_TYPE_BF16},
        {96, 33, 1, 20, 3, 7, GGML_TYPE_BF16},     {600, 48, 40, 70, 17, 48, GGML_TYPE_BF16},
        {288, 70, 300, 19, 16, 3, GGML_TYPE_BF16}, {50, 1, 2, 1, 0, 1, GGML_TYPE_BF16},
        {77, 90, 7, 40, 9, 22, GGML_TYPE_F32},
    };
    return all;
}

std::vector<gemm::Kernel> kernels_for(const LowRankCase& c) {
    std::vector<gemm::Kernel> kernels = {gemm::Kernel::ggml};
    for (const std::string& name : gemm::kernel_names()) {
        if (name != "ggml" && c.type == GGML_TYPE_BF16) kernels.push_back(gemm::kernel_by_name(name));
    }
    return kernels;
}

}  // namespace

TEST_CASE("low-rank changes are those of double precision") {
    for (const LowRankCase& c : cases()) {
        const Operands o(c);
        const std::vector<double> expected = reference(c, o);
        for (const gemm::Kernel kernel : kernels_for(c)) {
            const std::vector<float> result = run(c, o, kernel, 2);
            CAPTURE(gemm::name_of(kernel));
            CAPTURE(c.rank);
            // Tiles round activations, and a x, to bfloat16.
            const double unit = kernel == gemm::Kernel::ggml ? 1e-6 : 4e-3;
            const double size = kScale * std::sqrt(static_cast<double>(c.n_inner * c.rank));
            double worst = 0;
            for (size_t i = 0; i < result.size(); ++i)
                worst = std::max(worst, std::abs(result[i] - expected[i]) / size);
            CHECK(worst < 4 * unit);
            for (int64_t t = 0; t < c.n_tokens; ++t) {
                if (t >= c.first && t < c.first + c.n) continue;
                CHECK(std::equal(o.y.begin() + t * c.n_rows, o.y.begin() + (t + 1) * c.n_rows,
                                 result.begin() + t * c.n_rows));
            }
        }
    }
}

TEST_CASE("low-rank changes of experts are those of their matrices one by one") {
    constexpr int64_t n_inner = 40, n_rows = 70, rank = 3, n_expert = 5, n_used = 2, n_tokens = 9;
    const LowRankCase each = {n_inner, n_rows, rank, n_used * n_tokens, 0, n_used * n_tokens, GGML_TYPE_F32};
    const std::vector<float> a = random_values(n_expert * rank * n_inner, 1),
                             b = random_values(n_expert * n_rows * rank, 2);
    for (const bool shared : {false, true}) {  // x: a row for each token, or for each of its experts
        Operands o(each);
        Backend backend(2, "cpu");
        const ggml_context_ptr inputs(ggml_init({size_t{4} << 20, nullptr, false}));
        const auto input = [&](const std::vector<float>& values, int64_t n0, int64_t n1, int64_t n2) {
            ggml_tensor* tensor = ggml_new_tensor_3d(inputs.get(), GGML_TYPE_F32, n0, n1, n2);
            std::copy_n(values.data(), ggml_nelements(tensor), static_cast<float*>(tensor->data));
            return tensor;
        };
        ggml_tensor* chosen = ggml_new_tensor_2d(inputs.get(), GGML_TYPE_I32, n_used, n_tokens);
        auto* experts = static_cast<int32_t*>(chosen->data);
        for (int64_t i = 0; i < n_used * n_tokens; ++i)
            experts[i] = static_cast<int32_t>((i / n_used + i % n_used * 2) % (n_expert - 1));
        constexpr int64_t first = 2, n = 6;
        const LowRank change = {input(a, n_inner, rank, n_expert), input(b, rank, n_rows, n_expert), kScale,
                                first, n};
        ggml_tensor* x = input(o.x, n_inner, shared ? 1 : n_used, n_tokens);
        ggml_tensor* y = input(o.y, n_rows, n_used, n_tokens);
        const ggml_context_ptr context(ggml_init({size_t{1} << 20, nullptr, true}));
        ggml_cgraph* graph = ggml_new_graph(context.get());
        ggml_build_forward_expand(graph, add_low_rank(context.get(), change, x, y, chosen));
        GraphExecutor executor(backend);
        executor.allocate(graph, {}, {}, "the test");
        executor.compute(graph, [] { return false; });
        for (int64_t i = 0; i < n_used * n_tokens; ++i) {
            const int64_t token = i / n_used, x_row = shared ? token : i;
            LowRankCase one = each;
            one.n_tokens = one.n = 1;
            Operands its(one);
            std::copy_n(a.begin() + experts[i] * rank * n_inner, rank * n_inner, its.a.begin());
            std::copy_n(b.begin() + experts[i] * n_rows * rank, n_rows * rank, its.b.begin());
            std::copy_n(o.x.begin() + x_row * n_inner, n_inner, its.x.begin());
            std::copy_n(o.y.begin() + i * n_rows, n_rows, its.y.begin());
            const bool changed = token >= first && token < first + n;
            const std::vector<float> expected = changed ? run(one, its, gemm::Kernel::ggml, 1) : its.y;
            const float* result = static_cast<const float*>(y->data) + i * n_rows;
            CHECK(expected == std::vector<float>(result, result + n_rows));
        }
    }
}

TEST_CASE("no bit of a low-rank change depends on threads or on other tokens") {
    for (const LowRankCase& c : cases()) {
        const Operands o(c);
        for (const gemm::Kernel kernel : kernels_for(c)) {
            CAPTURE(gemm::name_of(kernel));
            const std::vector<float> result = run(c, o, kernel, 1);
            CHECK(result == run(c, o, kernel, 3));
            std::vector<float> by_token = o.y;
            for (int64_t t = c.first; t < c.first + c.n; ++t) {
                LowRankCase one = c;
                one.first = t;
                one.n = 1;
                const std::vector<float> its = run(one, o, kernel, 1);
                std::copy_n(its.begin() + t * c.n_rows, c.n_rows, by_token.begin() + t * c.n_rows);
            }
            CHECK(result == by_token);
        }
    }
}

}  // namespace testing
}  // namespace pydiffusion
