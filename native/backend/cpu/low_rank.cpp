#include "backend/cpu/low_rank.h"

#include <algorithm>
#include <vector>

#include "backend/cpu/custom_node.h"
#include "backend/cpu/simd_gemm.h"

namespace pydiffusion {

namespace {

using simd::kLanes;
using simd::kVectors;
using simd::kWidth;
using simd::Vector;

constexpr int kTokens = 4, kFactors = 4;  // multiplied at once: their sums are in registers
constexpr int64_t kTokensPerPiece = 8;    // at least, as each piece widens a
enum Parameter { kFirst, kScale };        // words of op_params after ggml's own

int32_t word_of(Parameter parameter) {
    return static_cast<int32_t>(sizeof(ggml_custom_op_params) / sizeof(int32_t)) + parameter;
}

// Values of a row of a factor as float32.
void widen(const ggml_tensor* factor, int64_t row, float* values) {
    const char* data = static_cast<const char*>(factor->data) + row * factor->nb[1];
    if (factor->type == GGML_TYPE_F32) {
        std::copy_n(reinterpret_cast<const float*>(data), factor->ne[0], values);
    } else {
        ggml_bf16_to_fp32_row(reinterpret_cast<const ggml_bf16_t*>(data), values, factor->ne[0]);
    }
}

std::vector<float>& scratch() {
    static thread_local std::vector<float> values;
    return values;
}

float sum_of(const Vector& v) {
    float values[kWidth], sum = 0.0f;
    simd::store(values, v);
    for (const float value : values) sum += value;
    return sum;
}

// Sums of n products of T rows of x with R rows of a, which are n apart: the same for each pair whatever T
// and R are.
template <int T, int R>
void multiply(const float* const* x, const float* a, int64_t n, float scale, float* const* targets) {
    Vector sums[T][R] = {};
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
        Vector left[T];
        for (int t = 0; t < T; ++t) left[t] = simd::load(x[t] + i);
        for (int r = 0; r < R; ++r) {
            const Vector right = simd::load(a + r * n + i);
            for (int t = 0; t < T; ++t) sums[t][r] += left[t] * right;
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) {
            float sum = sum_of(sums[t][r]);
            for (int64_t j = i; j < n; ++j) sum += x[t][j] * a[r * n + j];
            targets[t][r] = scale * sum;
        }
    }
}

template <int T>
void multiply_factors(const float* const* x, const float* a, int64_t n, int64_t rank, float scale,
                      float* const* targets) {
    int64_t r = 0;
    float* at[T];
    const auto advance = [&] {
        for (int t = 0; t < T; ++t) at[t] = targets[t] + r;
    };
    for (; r + kFactors <= rank; r += kFactors) {
        advance();
        multiply<T, kFactors>(x, a + r * n, n, scale, at);
    }
    for (; r < rank; ++r) {
        advance();
        multiply<T, 1>(x, a + r * n, n, scale, at);
    }
}

// dst [rank, n] = scale * (a x), of n tokens of x.
void inner_op(ggml_tensor* dst, int ith, int nth, void*) {
    const ggml_tensor *a = dst->src[0], *x = dst->src[1];
    const int64_t n = dst->ne[1], first = ggml_get_op_params_i32(dst, word_of(kFirst));
    const float scale = ggml_get_op_params_f32(dst, word_of(kScale));
    const int64_t n_pieces = std::clamp<int64_t>(n / kTokensPerPiece, 1, nth);
    if (ith >= n_pieces) return;
    const int64_t end = n * (ith + 1) / n_pieces;
    std::vector<float>& wide = scratch();
    wide.resize(a->ne[0] * a->ne[1]);
    for (int64_t r = 0; r < a->ne[1]; ++r) widen(a, r, wide.data() + r * a->ne[0]);
    for (int64_t t = n * ith / n_pieces; t < end;) {
        const float* rows[kTokens];
        float* targets[kTokens];
        const int64_t n_here = end - t >= kTokens ? kTokens : 1;
        for (int64_t i = 0; i < n_here; ++i) {
            rows[i] = reinterpret_cast<const float*>(static_cast<const char*>(x->data) +
                                                     (first + t + i) * x->nb[1]);
            targets[i] = reinterpret_cast<float*>(static_cast<char*>(dst->data) + (t + i) * dst->nb[1]);
        }
        const auto multiply_them = n_here == kTokens ? multiply_factors<kTokens> : multiply_factors<1>;
        multiply_them(rows, wide.data(), a->ne[0], a->ne[1], scale, targets);
        t += n_here;
    }
}

// y[0..T) += sum over k of u[.][k] b[k], for kLanes outputs; b [rank][kLanes].
template <int T>
void add_products(const float* u, int64_t rank, const float* b, float* const* y) {
    Vector sums[T][kVectors];
    for (int t = 0; t < T; ++t) {
        for (int v = 0; v < kVectors; ++v) sums[t][v] = simd::load(y[t] + v * kWidth);
    }
    for (int64_t k = 0; k < rank; ++k) {
        for (int v = 0; v < kVectors; ++v) {
            const Vector right = simd::load(b + k * kLanes + v * kWidth);
            for (int t = 0; t < T; ++t) sums[t][v] += u[t * rank + k] * right;
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int v = 0; v < kVectors; ++v) simd::store(y[t] + v * kWidth, sums[t][v]);
    }
}

// Adds b u to the rows [first, first + n) of dst, of whose elements [row, row + n_rows) are computed.
void add_block(const ggml_tensor* dst, const float* b, int64_t row, int64_t n_rows) {
    const ggml_tensor* u = dst->src[1];
    const int64_t rank = u->ne[0], n = u->ne[1], first = ggml_get_op_params_i32(dst, word_of(kFirst));
    const auto target = [&](int64_t t) {
        return reinterpret_cast<float*>(static_cast<char*>(dst->data) + (first + t) * dst->nb[1]) + row;
    };
    const float* inner = static_cast<const float*>(u->data);
    if (n_rows < kLanes) {  // the last ones
        for (int64_t t = 0; t < n; ++t) {
            float sums[kLanes] = {};
            float* y = sums;
            std::copy_n(target(t), n_rows, sums);
            add_products<1>(inner + t * rank, rank, b, &y);
            std::copy_n(sums, n_rows, target(t));
        }
        return;
    }
    int64_t t = 0;
    for (; t + kTokens <= n; t += kTokens) {
        float* y[kTokens];
        for (int i = 0; i < kTokens; ++i) y[i] = target(t + i);
        add_products<kTokens>(inner + t * rank, rank, b, y);
    }
    for (; t < n; ++t) {
        float* y = target(t);
        add_products<1>(inner + t * rank, rank, b, &y);
    }
}

// dst [n_rows, n_tokens], in place of src[0], += b u for the tokens of u.
void outer_op(ggml_tensor* dst, int ith, int nth, void*) {
    const ggml_tensor* b = dst->src[2];
    const int64_t rank = b->ne[0], n_rows = b->ne[1], n_blocks = (n_rows + kLanes - 1) / kLanes;
    std::vector<float>& values = scratch();
    values.resize((kLanes + 1) * rank);
    float *transposed = values.data(), *row = transposed + kLanes * rank;
    for (int64_t block = n_blocks * ith / nth; block < n_blocks * (ith + 1) / nth; ++block) {
        const int64_t first = block * kLanes, n = std::min<int64_t>(kLanes, n_rows - first);
        std::fill_n(transposed, kLanes * rank, 0.0f);
        for (int64_t i = 0; i < n; ++i) {
            widen(b, first + i, row);
            for (int64_t k = 0; k < rank; ++k) transposed[k * kLanes + i] = row[k];
        }
        add_block(dst, transposed, first, n);
    }
}

}  // namespace

ggml_tensor* add_low_rank(ggml_context* ctx, const LowRank& change, ggml_tensor* x, ggml_tensor* result) {
    ggml_tensor* operands[] = {change.a, x};
    ggml_tensor* inner = ggml_custom_4d(ctx, GGML_TYPE_F32, change.a->ne[1], change.n, 1, 1, operands, 2,
                                        inner_op, GGML_N_TASKS_MAX, nullptr);
    ggml_set_op_params_i32(inner, word_of(kFirst), static_cast<int32_t>(change.first));
    ggml_set_op_params_f32(inner, word_of(kScale), change.scale);
    ggml_set_name(inner, "low_rank_inner");
    ggml_tensor* factors[] = {inner, change.b};
    ggml_tensor* sum = ggml_custom_inplace(ctx, result, factors, 2, outer_op, GGML_N_TASKS_MAX, nullptr);
    ggml_set_op_params_i32(sum, word_of(kFirst), static_cast<int32_t>(change.first));
    return ggml_set_name(sum, "add_low_rank");
}

}  // namespace pydiffusion
