#include "backend/cpu/low_rank.h"

#include <algorithm>
#include <string>
#include <vector>

#include "backend/cpu/low_rank_node.h"
#include "backend/cpu/simd_gemm.h"

namespace pydiffusion {

namespace {

using simd::kLanes;
using simd::kVectors;
using simd::kWidth;
using simd::Vector;
using namespace low_rank;

constexpr int kTokens = 4, kFactors = 4;  // multiplied at once: their sums are in registers
constexpr int64_t kTokensPerPiece = 8;    // at least, as each piece widens a

// Values of a row of a factor, of an expert's if it has experts, as float32.
void widen(const ggml_tensor* factor, int64_t expert, int64_t row, float* values) {
    const char* data = static_cast<const char*>(factor->data) + expert * factor->nb[2] + row * factor->nb[1];
    if (factor->type == GGML_TYPE_F32) {
        std::copy_n(reinterpret_cast<const float*>(data), factor->ne[0], values);
    } else {
        ggml_bf16_to_fp32_row(reinterpret_cast<const ggml_bf16_t*>(data), values, factor->ne[0]);
    }
}

// A row that a factor is multiplied with, and where its results go.
struct Operand {
    const float* x;
    float* result;
};

// Per-thread buffers.
struct Workspace {
    std::vector<float> values;
    std::vector<Operand> operands;
};

Workspace& workspace() {
    static thread_local Workspace own;
    return own;
}

const float* row_of(const ggml_tensor* t, int64_t i1, int64_t i2 = 0) {
    return reinterpret_cast<const float*>(static_cast<const char*>(t->data) + i1 * t->nb[1] + i2 * t->nb[2]);
}

float* row_of(ggml_tensor* t, int64_t i1, int64_t i2 = 0) {
    return const_cast<float*>(row_of(static_cast<const ggml_tensor*>(t), i1, i2));
}

float sum_of(const Vector& v) {
    float values[kWidth], sum = 0.0f;
    simd::store(values, v);
    for (const float value : values) sum += value;
    return sum;
}

// Results of T rows of x with R rows of a, which are n long: the same for each pair whatever T and R are.
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

// Multiplies the workspace's operands by a, of an expert if it has experts.
void multiply_all(const ggml_tensor* a, int64_t expert, float scale) {
    Workspace& ws = workspace();
    const int64_t n_inner = a->ne[0], rank = a->ne[1];
    ws.values.resize(n_inner * rank);
    for (int64_t r = 0; r < rank; ++r) widen(a, expert, r, ws.values.data() + r * n_inner);
    for (size_t i = 0; i < ws.operands.size();) {
        const float* rows[kTokens];
        float* targets[kTokens];
        const size_t n = ws.operands.size() - i >= kTokens ? kTokens : 1;
        for (size_t j = 0; j < n; ++j) {
            rows[j] = ws.operands[i + j].x;
            targets[j] = ws.operands[i + j].result;
        }
        const auto multiply_them = n == kTokens ? multiply_factors<kTokens> : multiply_factors<1>;
        multiply_them(rows, ws.values.data(), n_inner, rank, scale, targets);
        i += n;
    }
}

// Adds the operands, multiplied by a block of rows of b, transposed [rank][kLanes], to the elements from
// `row` on of their results.
template <int T>
void add_operands(const Operand* operands, int64_t rank, const float* b, int64_t row) {
    Vector sums[T][kVectors];
    for (int t = 0; t < T; ++t) {
        for (int v = 0; v < kVectors; ++v) sums[t][v] = simd::load(operands[t].result + row + v * kWidth);
    }
    for (int64_t k = 0; k < rank; ++k) {
        for (int v = 0; v < kVectors; ++v) {
            const Vector right = simd::load(b + k * kLanes + v * kWidth);
            for (int t = 0; t < T; ++t) sums[t][v] += operands[t].x[k] * right;
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int v = 0; v < kVectors; ++v) simd::store(operands[t].result + row + v * kWidth, sums[t][v]);
    }
}

void add_block(const std::vector<Operand>& operands, int64_t rank, const float* b, int64_t row,
               int64_t n_rows) {
    size_t i = 0;
    if (n_rows < kLanes) {  // the last ones
        for (; i < operands.size(); ++i) {
            float sums[kLanes] = {};
            const Operand padded = {operands[i].x, sums};
            std::copy_n(operands[i].result + row, n_rows, sums);
            add_operands<1>(&padded, rank, b, 0);
            std::copy_n(sums, n_rows, operands[i].result + row);
        }
        return;
    }
    for (; i + kTokens <= operands.size(); i += kTokens)
        add_operands<kTokens>(operands.data() + i, rank, b, row);
    for (; i < operands.size(); ++i) add_operands<1>(operands.data() + i, rank, b, row);
}

int64_t n_blocks_of(const ggml_tensor* b) { return (b->ne[1] + kLanes - 1) / kLanes; }

// Adds the workspace's operands, multiplied by some blocks of b's rows, to their results.
void add_all(const ggml_tensor* b, int64_t expert, int64_t first_block, int64_t end_block) {
    Workspace& ws = workspace();
    const int64_t rank = b->ne[0];
    ws.values.resize((kLanes + 1) * rank);
    float *transposed = ws.values.data(), *values = transposed + kLanes * rank;
    for (int64_t block = first_block; block < end_block; ++block) {
        const int64_t first = block * kLanes, n = std::min<int64_t>(kLanes, b->ne[1] - first);
        std::fill_n(transposed, kLanes * rank, 0.0f);
        for (int64_t i = 0; i < n; ++i) {
            widen(b, expert, first + i, values);
            for (int64_t k = 0; k < rank; ++k) transposed[k * kLanes + i] = values[k];
        }
        add_block(ws.operands, rank, transposed, first, n);
    }
}

// dst [rank, n] = scale * (a x), of n tokens of x.
void inner_op(ggml_tensor* dst, int ith, int nth, void*) {
    const ggml_tensor* x = dst->src[1];
    const int64_t n = dst->ne[1], first = first_of(dst);
    const int64_t n_pieces = std::clamp<int64_t>(n / kTokensPerPiece, 1, nth);
    if (ith >= n_pieces) return;
    workspace().operands.clear();
    for (int64_t t = n * ith / n_pieces; t < n * (ith + 1) / n_pieces; ++t)
        workspace().operands.push_back({row_of(x, first + t), row_of(dst, t)});
    multiply_all(dst->src[0], 0, scale_of(dst));
}

// dst [n_rows, n_tokens], in place of src[0], += b u for the tokens of u.
void outer_op(ggml_tensor* dst, int ith, int nth, void*) {
    const ggml_tensor *u = dst->src[1], *b = dst->src[2];
    const int64_t first = first_of(dst), n_blocks = n_blocks_of(b);
    workspace().operands.clear();
    for (int64_t t = 0; t < u->ne[1]; ++t)
        workspace().operands.push_back({row_of(u, t), row_of(dst, first + t)});
    add_all(b, 0, n_blocks * ith / nth, n_blocks * (ith + 1) / nth);
}

// Calls work(expert) for a piece's share of the experts, with `add(used, token)` called before for each place
// of the table chosen [n_used, n_tokens] where the expert is, among n tokens from `first` on.
template <typename Add, typename Work>
void for_experts(const ggml_tensor* chosen, int64_t n_expert, int64_t first, int64_t n, int ith, int nth,
                 const Add& add, const Work& work) {
    for (int64_t e = n_expert * ith / nth; e < n_expert * (ith + 1) / nth; ++e) {
        workspace().operands.clear();
        for (int64_t t = 0; t < n; ++t) {
            const char* row = static_cast<const char*>(chosen->data) + (first + t) * chosen->nb[1];
            for (int64_t used = 0; used < chosen->ne[0]; ++used) {
                if (*reinterpret_cast<const int32_t*>(row + used * chosen->nb[0]) == e) add(used, t);
            }
        }
        if (!workspace().operands.empty()) work(e);
    }
}

// dst [rank, n_used, n] = scale * (a x) of the chosen experts' a.
void inner_experts_op(ggml_tensor* dst, int ith, int nth, void*) {
    const ggml_tensor *a = dst->src[0], *x = dst->src[1];
    const int64_t first = first_of(dst);
    const float scale = scale_of(dst);
    for_experts(
        dst->src[2], a->ne[2], first, dst->ne[2], ith, nth,
        [&](int64_t used, int64_t t) {
            workspace().operands.push_back({row_of(x, used % x->ne[1], first + t), row_of(dst, used, t)});
        },
        [&](int64_t e) { multiply_all(a, e, scale); });
}

// dst [n_rows, n_used, n_tokens], in place of src[0], += b u of the chosen experts' b, for the tokens of u.
void outer_experts_op(ggml_tensor* dst, int ith, int nth, void*) {
    const ggml_tensor *u = dst->src[1], *b = dst->src[2];
    const int64_t first = first_of(dst);
    for_experts(
        dst->src[3], b->ne[2], first, u->ne[2], ith, nth,
        [&](int64_t used, int64_t t) {
            workspace().operands.push_back({row_of(u, used, t), row_of(dst, used, first + t)});
        },
        [&](int64_t e) { add_all(b, e, 0, n_blocks_of(b)); });
}

}  // namespace

ggml_tensor* add_low_rank(ggml_context* ctx, const LowRank& change, ggml_tensor* x, ggml_tensor* result,
                          ggml_tensor* chosen) {
    ggml_tensor* operands[] = {change.a, x, chosen};
    const int n_operands = chosen ? 3 : 2;
    const int64_t n_used = chosen ? chosen->ne[0] : change.n, n = chosen ? change.n : 1;
    ggml_tensor* inner =
        ggml_custom_4d(ctx, GGML_TYPE_F32, change.a->ne[1], n_used, n, 1, operands, n_operands,
                       chosen ? inner_experts_op : inner_op, GGML_N_TASKS_MAX, nullptr);
    set_tokens(inner, change.first, change.n);
    set_scale(inner, change.scale);
    ggml_set_name(inner, chosen ? "low_rank_inner_experts" : "low_rank_inner");
    ggml_tensor* factors[] = {inner, change.b, chosen};
    ggml_tensor* sum = ggml_custom_inplace(ctx, result, factors, n_operands,
                                           chosen ? outer_experts_op : outer_op, GGML_N_TASKS_MAX, nullptr);
    set_tokens(sum, change.first, change.n);
    return ggml_set_name(sum, chosen ? "add_low_rank_experts" : "add_low_rank");
}

namespace {

bool begins_with(const std::string& name, const char* beginning) { return name.rfind(beginning, 0) == 0; }

}  // namespace

LowRankWork low_rank_work(const ggml_tensor* node) {
    const std::string name = node->op == GGML_OP_CUSTOM ? node->name : "";
    const bool inner = begins_with(name, kInner);
    if (!inner && !begins_with(name, kOuter)) return {};
    const ggml_tensor* chosen =
        name.find(kOfExperts) == std::string::npos ? nullptr : node->src[inner ? 2 : 3];
    return {node->src[inner ? 0 : 2], count_of(node) * (chosen ? chosen->ne[0] : 1)};
}

}  // namespace pydiffusion
