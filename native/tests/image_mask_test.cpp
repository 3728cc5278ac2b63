// What tokens of a prompt with images see: the range, the masks of devices, and attention on the CPU.
#include <algorithm>
#include <cmath>
#include <limits>

#include "backend/cpu/attention.h"
#include "backend/graph_executor.h"
#include "backend/ops/ggml_attention.h"
#include "ggml-cpp.h"
#include "support.h"
#include "tile_checks.h"

namespace pydiffusion {
namespace testing {

namespace {

constexpr int32_t kRow = 64, kFirst = 100, kTokens = 70;  // positions of row 0 and of token 0; tokens

// Images of one token, next to each other, longer than the window, and at the last token.
const std::vector<ImageRange> kImages = {{103, 104}, {104, 109}, {115, 150}, {165, 170}};

std::vector<Causal> masks() {
    std::vector<Causal> all;
    for (const int32_t window : {1, 12, 40, std::numeric_limits<int32_t>::max()}) {
        all.push_back({kRow, kFirst, window});
        all.push_back({kRow, kFirst, window, kImages});
    }
    all.push_back({kRow, kFirst, 12, {{kFirst, kFirst + kTokens}}});
    return all;
}

// By the definition: causal and within the window, or of the same image.
bool sees(const Causal& causal, int32_t token, int32_t row) {
    const int32_t own = causal.token_position + token, other = causal.row_position + row;
    if (other <= own && own - other < causal.window) return true;
    return std::any_of(causal.images.begin(), causal.images.end(), [&](const ImageRange& image) {
        return image.begin <= own && own < image.end && image.begin <= other && other < image.end;
    });
}

constexpr int32_t kRows = kFirst - kRow + kTokens;

}  // namespace

TEST_CASE("what a token sees is one range, the causal one and its image") {
    for (const Causal& causal : masks()) {
        CAPTURE(causal.window);
        CAPTURE(causal.images.size());
        for (int32_t t = 0; t < kTokens; ++t) {
            const Causal::Rows rows = causal.visible(t);
            int32_t n_wrong = 0;
            for (int32_t row = 0; row < kRows; ++row)
                n_wrong += sees(causal, t, row) != (row >= rows.first && row <= rows.last);
            CHECK(n_wrong == 0);
        }
    }
}

TEST_CASE("the mask of a device, whose padding nobody sees") {
    for (const Causal& causal : masks()) {
        const ggml_context_ptr context(ggml_init({ggml_tensor_overhead(), nullptr, true}));
        const int64_t n_padded = ggml_ops::pad_to_mask(kRows);
        const ggml_ops::Mask mask = {ggml_new_tensor_2d(context.get(), GGML_TYPE_F16, n_padded, kTokens),
                                     kRows, &causal};
        const ggml_backend_buffer_ptr buffer(
            ggml_backend_alloc_ctx_tensors_from_buft(context.get(), ggml_backend_cpu_buffer_type()));
        ggml_ops::fill(mask);
        const auto* values = static_cast<const ggml_fp16_t*>(mask.tensor->data);
        int32_t n_wrong = 0;
        for (int32_t t = 0; t < kTokens; ++t) {
            for (int32_t row = 0; row < n_padded; ++row) {
                const bool visible = ggml_fp16_to_fp32(values[t * n_padded + row]) == 0.0f;
                n_wrong += visible != (row < kRows && sees(causal, t, row));
            }
        }
        CHECK(n_wrong == 0);
    }
}

namespace {

constexpr int64_t kDim = 32, kHeads = 4, kKvHeads = 2;

struct Operands {
    std::vector<float> q, k, v;  // [token][head][dim], [row][KV head][dim]
};

std::vector<float> attended(const Operands& in, const Causal& causal, gemm::Kernel kernel, ggml_type type) {
    Backend backend(2, "cpu");
    const ggml_context_ptr operands(ggml_init({4 * ggml_tensor_overhead(), nullptr, true}));
    const ggml_context_ptr context(
        ggml_init({16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true}));
    ggml_context* ctx = context.get();
    ggml_tensor* q = ggml_new_tensor_3d(operands.get(), GGML_TYPE_F32, kDim, kHeads, kTokens);
    ggml_tensor* k = ggml_new_tensor_2d(operands.get(), type, kDim * kKvHeads, kRows);
    ggml_tensor* v = ggml_new_tensor_2d(operands.get(), type, kDim * kKvHeads, kRows);
    const ggml_backend_buffer_ptr buffer(
        ggml_backend_alloc_ctx_tensors_from_buft(operands.get(), ggml_backend_cpu_buffer_type()));
    const auto set = [&](ggml_tensor* t, const std::vector<float>& values) {
        if (t->type == GGML_TYPE_F32) {
            ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
        } else {
            ggml_fp32_to_fp16_row(values.data(), static_cast<ggml_fp16_t*>(t->data), ggml_nelements(t));
        }
    };
    set(q, in.q);
    set(k, in.k);
    set(v, in.v);
    const auto heads = [&](ggml_tensor* rows) {
        return ggml_view_3d(ctx, rows, kDim, kRows, kKvHeads, rows->nb[1], ggml_row_size(type, kDim), 0);
    };
    ggml_cgraph* graph = ggml_new_graph(ctx);
    ggml_tensor* result = attend(ctx, q, heads(k), heads(v), &causal, kernel);
    ggml_set_output(result);
    ggml_build_forward_expand(graph, result);
    GraphExecutor executor(backend);
    executor.allocate(graph, {}, {}, "attention");
    executor.compute(graph, [] { return false; });
    std::vector<float> found(ggml_nelements(result));
    ggml_backend_tensor_get(result, found.data(), 0, ggml_nbytes(result));
    return found;
}

// In double precision, over the rows that a token sees by the definition.
double largest_error(const Operands& in, const Causal& causal, const std::vector<float>& found) {
    double worst = 0.0;
    for (int32_t t = 0; t < kTokens; ++t) {
        for (int64_t head = 0; head < kHeads; ++head) {
            const float* q = in.q.data() + (t * kHeads + head) * kDim;
            std::vector<double> sum(kDim, 0.0);
            double total = 0.0;
            for (int32_t row = 0; row < kRows; ++row) {
                if (!sees(causal, t, row)) continue;
                const int64_t at = (row * kKvHeads + head / (kHeads / kKvHeads)) * kDim;
                double score = 0.0;
                for (int64_t d = 0; d < kDim; ++d) score += static_cast<double>(q[d]) * in.k[at + d];
                const double weight = std::exp(score);
                total += weight;
                for (int64_t d = 0; d < kDim; ++d) sum[d] += weight * in.v[at + d];
            }
            for (int64_t d = 0; d < kDim; ++d)
                worst = std::max(
                    worst,
                    std::fabs(sum[d] / total - static_cast<double>(found[(t * kHeads + head) * kDim + d])));
        }
    }
    return worst;
}

void check_attention(gemm::Kernel kernel, ggml_type type, double bound) {
    const Operands in = {random_values(kTokens * kHeads * kDim, 1, 0.3f),
                         random_values(kRows * kKvHeads * kDim, 2),
                         random_values(kRows * kKvHeads * kDim, 3)};
    for (const Causal& causal : masks()) {
        CAPTURE(causal.window);
        CAPTURE(causal.images.size());
        CHECK(largest_error(in, causal, attended(in, causal, kernel, type)) < bound);
    }
}

}  // namespace

TEST_CASE("attention on the CPU") {
    check_attention(gemm::Kernel::ggml, GGML_TYPE_F32, 1e-5);
    check_attention(gemm::Kernel::ggml, GGML_TYPE_F16, 5e-3);  // the rows are rounded
    if (has_kernel("amx")) check_attention(gemm::Kernel::amx, GGML_TYPE_F16, 5e-3);
}

}  // namespace testing
}  // namespace pydiffusion
