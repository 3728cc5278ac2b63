#include "backend/cpu/fused_rows.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "backend/cpu/custom_node.h"
#include "backend/cpu/node_parts.h"
#include "util/simd_math.h"

namespace pydiffusion {

namespace {

float* row(const ggml_tensor* t, int64_t i1, int64_t i2 = 0, int64_t i3 = 0) {
    return reinterpret_cast<float*>(static_cast<char*>(t->data) + i1 * t->nb[1] + i2 * t->nb[2] +
                                    i3 * t->nb[3]);
}

const float* vector_of(const ggml_tensor* t) { return static_cast<const float*>(t->data); }

// Calls f(i) for a thread's range of [0, n).
template <typename F>
void for_range(int64_t n, int ith, int nth, const F& f) {
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; ++i) f(i);
}

// --- gated GELU ---

// gelu_tanh(x) = x / 2 * (1 + tanh(y)) = x / (1 + exp(-2 y)), with y = sqrt(2 / pi) * (x + 0.044715 x^3).
void gated_gelu_row(float* out, const float* gate, const float* up, int64_t n) {
    constexpr float a = static_cast<float>(-2.0 * 0.79788456080286535588 * kLog2E), b = a * 0.044715f;
    for (int64_t i = 0; i < n; ++i) {
        const float x = gate[i];
        // Beyond these limits, gelu is 0 or x to float precision.
        float exponent = x * (a + b * x * x);
        exponent = exponent > -126.0f ? exponent : -126.0f;
        exponent = exponent < 100.0f ? exponent : 100.0f;
        out[i] = x / (1.0f + small_exp2(exponent)) * up[i];
    }
}

void compute_gelu_row(const ggml_tensor* node, int64_t i1, int64_t i2, float* out) {
    gated_gelu_row(out, row(node->src[0], i1, i2), row(node->src[1], i1, i2), node->ne[0]);
}

// --- RMS norm ---

// Sums squares in enough lanes to hide the latency of additions, in a fixed order.
float mean_square(const float* x, int64_t n) {
    constexpr int64_t kLanes = 64;
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] += x[i + l] * x[i + l];
    }
    for (; i < n; ++i) lanes[i % kLanes] += x[i] * x[i];
    double sum = 0.0;
    for (const float lane : lanes) sum += lane;
    return static_cast<float>(sum / static_cast<double>(n));
}

float norm_scale(const float* x, int64_t n, float eps) { return 1.0f / std::sqrt(mean_square(x, n) + eps); }

// weight may be null. out may be x.
void norm_row(float* out, const float* x, const float* weight, int64_t n, float eps) {
    const float scale = norm_scale(x, n, eps);
    if (weight) {
        for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
    } else {
        for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale;
    }
}

void compute_norm_row(const ggml_tensor* node, int64_t i1, int64_t i2, float* out) {
    const ggml_tensor *x = node->src[0], *weight = node->src[1];
    norm_row(out, row(x, i1, i2), weight ? vector_of(weight) : nullptr, node->ne[0], eps_of(node));
}

// --- RMS norm and RoPE of heads ---

void rotate_normed_row(float* out, const float* x, const float* weight, const float* angles, int64_t n,
                       float eps) {
    const int64_t half = n / 2;
    const float *cosine = angles, *sine = cosine + half;
    const float scale = norm_scale(x, n, eps);
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i] * scale * weight[i], b = x[half + i] * scale * weight[half + i];
        out[i] = a * cosine[i] - b * sine[i];
        out[half + i] = a * sine[i] + b * cosine[i];
    }
}

// Two rotations: of the first half of the head by the first half of the angles, then of the second ones.
void rotate_axes_row(float* out, const float* x, const float* weight, const float* angles, int64_t n,
                     float eps) {
    const int64_t quarter = n / 4;
    const float scale = norm_scale(x, n, eps);
    for (int64_t first = 0; first < n; first += n / 2) {
        const float *cosine = angles + first, *sine = cosine + quarter;
        const float *from = x + first, *w = weight + first;
        for (int64_t i = 0; i < quarter; ++i) {
            const float a = from[i] * scale * w[i], b = from[quarter + i] * scale * w[quarter + i];
            out[first + i] = a * cosine[i] - b * sine[i];
            out[first + quarter + i] = a * sine[i] + b * cosine[i];
        }
    }
}

void compute_axes_row(const ggml_tensor* node, int64_t head, int64_t t, float* out) {
    rotate_axes_row(out, row(node->src[0], head, t), vector_of(node->src[1]), row(node->src[2], t),
                    node->ne[0], eps_of(node));
}

void compute_rotated_row(const ggml_tensor* node, int64_t head, int64_t t, float* out) {
    rotate_normed_row(out, row(node->src[0], head, t), vector_of(node->src[1]), row(node->src[2], t),
                      node->ne[0], eps_of(node));
}

// The first source is the view that the node writes to.
void compute_stored_row(const ggml_tensor* node, int64_t head, int64_t t, float* out) {
    const float* x = row(node->src[1], head, t);
    const ggml_tensor *weight = node->src[2], *angles = node->src[3];
    if (weight) {
        rotate_normed_row(out, x, vector_of(weight), row(angles, t), node->ne[0], eps_of(node));
    } else {
        norm_row(out, x, nullptr, node->ne[0], eps_of(node));
    }
}

// --- limits ---

constexpr uint32_t kLowWord = 10, kHighWord = 11;  // of the parameters

// Keeps NaN.
void compute_limited_row(const ggml_tensor* node, int64_t i1, int64_t i2, float* out) {
    const float low = ggml_get_op_params_f32(node, kLowWord), high = ggml_get_op_params_f32(node, kHighWord);
    const float* x = row(node->src[0], i1, i2);
    for (int64_t i = 0; i < node->ne[0]; ++i) {
        const float value = x[i] < low ? low : x[i];
        out[i] = value > high ? high : value;
    }
}

// --- tokens of several sequences ---

void compute_stacked_row(const ggml_tensor* node, int64_t i1, int64_t, float* out) {
    const ggml_tensor* const* part = node->src;
    for (; i1 >= (*part)->ne[1]; ++part) i1 -= (*part)->ne[1];
    std::copy_n(row(*part, i1), node->ne[0], out);
}

// --- nodes that are computed row by row ---

void convert_row(const float* values, ggml_type type, void* out, int64_t n) {
    if (type == GGML_TYPE_BF16) {
        ggml_fp32_to_bf16_row(values, static_cast<ggml_bf16_t*>(out), n);
    } else {
        ggml_fp32_to_fp16_row(values, static_cast<ggml_fp16_t*>(out), n);
    }
}

template <ComputeRow compute>
void rows_op(ggml_tensor* dst, int ith, int nth, void*) {
    static thread_local std::vector<float> values;
    for_range(dst->ne[1] * dst->ne[2], ith, nth, [&](int64_t r) {
        const int64_t i1 = r % dst->ne[1], i2 = r / dst->ne[1];
        if (dst->type == GGML_TYPE_F32) {
            compute(dst, i1, i2, row(dst, i1, i2));
            return;
        }
        values.resize(dst->ne[0]);
        compute(dst, i1, i2, values.data());
        convert_row(values.data(), dst->type, row(dst, i1, i2), dst->ne[0]);
    });
}

// Sources: Q, its weight, the angles, K, its weight, V, the views for K and V.
void rotate_and_store_op(ggml_tensor* dst, int ith, int nth, void*) {
    static thread_local std::vector<float> values;
    const ggml_tensor* const* src = dst->src;
    const int64_t n = dst->ne[0];
    const float eps = eps_of(dst);
    values.resize(n);
    const auto write = [&](const ggml_tensor* x, const float* weight, const ggml_tensor* target, int64_t head,
                           int64_t t) {
        float* out = target->type == GGML_TYPE_F32 ? row(target, head, t) : values.data();
        if (weight) {
            rotate_normed_row(out, row(x, head, t), weight, row(src[2], t), n, eps);
        } else {
            norm_row(out, row(x, head, t), nullptr, n, eps);
        }
        if (target->type != GGML_TYPE_F32) convert_row(out, target->type, row(target, head, t), n);
    };
    for_range(dst->ne[2], ith, nth, [&](int64_t t) {
        for (int64_t head = 0; head < dst->ne[1]; ++head) write(src[0], vector_of(src[1]), dst, head, t);
        for (int64_t head = 0; head < src[3]->ne[1]; ++head) {
            write(src[3], vector_of(src[4]), src[6], head, t);
            write(src[5], nullptr, src[7], head, t);
        }
    });
}

// --- nodes of several results: the type of one, and an order ---

// Words of the parameters after those of custom nodes.
constexpr uint32_t kTypeWord = 8, kOrderWord = 9;
static_assert(sizeof(ggml_custom_op_params) <= kTypeWord * sizeof(int32_t));

void set_variant(ggml_tensor* node, ggml_type type, bool order) {
    ggml_set_op_params_i32(node, kTypeWord, type);
    ggml_set_op_params_i32(node, kOrderWord, order);
}
ggml_type type_variant(const ggml_tensor* node) {
    return static_cast<ggml_type>(ggml_get_op_params_i32(node, kTypeWord));
}
bool order_variant(const ggml_tensor* node) { return ggml_get_op_params_i32(node, kOrderWord) != 0; }

constexpr int kNextNorm = GGML_MAX_SRC - 1;  // source of join_branches

AttentionEndParts attention_end_parts(int64_t d, int64_t n_tokens, ggml_type dense_type, bool for_repacked) {
    const int64_t row_bytes = static_cast<int64_t>(ggml_row_size(GGML_TYPE_F32, d));
    AttentionEndParts parts = {dense_type, for_repacked, after_part(0, n_tokens * row_bytes), 0, 0};
    parts.router = after_part(parts.dense, n_tokens * static_cast<int64_t>(ggml_row_size(dense_type, d)));
    parts.packed = after_part(parts.router, n_tokens * row_bytes);
    return parts;
}

// --- residual additions ---

void add_normed_op(ggml_tensor* dst, int ith, int nth, void*) {
    const ggml_tensor *x = dst->src[0], *branch = dst->src[1];
    const float *weight = vector_of(dst->src[2]), eps = eps_of(dst);
    const int64_t n = dst->ne[0];
    for_range(dst->ne[1], ith, nth, [&](int64_t t) {
        const float *from = row(x, t), *b = row(branch, t);
        float* out = row(dst, t);
        const float scale = norm_scale(b, n, eps);
        for (int64_t i = 0; i < n; ++i) out[i] = from[i] + b[i] * scale * weight[i];
    });
}

// values times weight, as rows of this type.
void write_normed_row(void* out, ggml_type type, const float* x, float scale, const float* weight,
                      int64_t n) {
    static thread_local std::vector<float> converted;
    converted.resize(n);
    float* values = type == GGML_TYPE_F32 ? static_cast<float*>(out) : converted.data();
    for (int64_t i = 0; i < n; ++i) values[i] = x[i] * scale * weight[i];
    if (type != GGML_TYPE_F32) convert_row(values, type, out, n);
}

char* part_row(const ggml_tensor* node, int64_t begin, ggml_type type, int64_t n, int64_t t) {
    return static_cast<char*>(node->data) + begin + t * static_cast<int64_t>(ggml_row_size(type, n));
}

// Sources: x, the branch, its weight, the norms of the dense branch and the router, and that of the experts
// if they are packed: then a device computes this.
void end_attention_op(ggml_tensor* dst, int ith, int nth, void*) {
    GGML_ASSERT(!dst->src[5]);
    const AttentionEndParts parts = parts_of_attention_end(dst);
    const ggml_tensor *x = dst->src[0], *branch = dst->src[1];
    const float *weight = vector_of(dst->src[2]), eps = eps_of(dst);
    const int64_t n = dst->ne[0];
    for_range(x->ne[1], ith, nth, [&](int64_t t) {
        const float *from = row(x, t), *b = row(branch, t);
        float* r = row(dst, t);
        const float branch_scale = norm_scale(b, n, eps);
        for (int64_t i = 0; i < n; ++i) r[i] = from[i] + b[i] * branch_scale * weight[i];
        const float scale = norm_scale(r, n, eps);
        write_normed_row(part_row(dst, parts.dense, parts.dense_type, n, t), parts.dense_type, r, scale,
                         vector_of(dst->src[3]), n);
        write_normed_row(part_row(dst, parts.router, GGML_TYPE_F32, n, t), GGML_TYPE_F32, r, scale,
                         vector_of(dst->src[4]), n);
    });
}

void add_weighted(float* sum, const float* values, float weight, int64_t n) {
    for (int64_t i = 0; i < n; ++i) sum[i] += weight * values[i];
}

// Softmax over the chosen experts' scores, each weight times its expert's own scale. A softmax over all
// experts with renormalization would give the same, except for NaN: a non-finite score of any expert makes
// the token's weights NaN.
void route_token(float* weights, const ggml_tensor* scores, const ggml_tensor* chosen, int64_t t,
                 float score_scale, const float* expert_scales) {
    const float* score = row(scores, t);
    const auto* expert = reinterpret_cast<const int32_t*>(row(chosen, t));
    float sum = 0.0f;
    for (int64_t e = 0; e < scores->ne[0]; ++e) sum += score[e] - score[e];  // 0, or NaN
    for (int64_t i = 0; i < chosen->ne[0]; ++i) {                            // the first is the largest
        weights[i] = std::exp((score[expert[i]] - score[expert[0]]) * score_scale);
        sum += weights[i];
    }
    for (int64_t i = 0; i < chosen->ne[0]; ++i) weights[i] *= expert_scales[expert[i]] / sum;
}

void join_branches_op(ggml_tensor* dst, int ith, int nth, void* scale) {
    const ggml_tensor *x = dst->src[0], *dense = dst->src[1], *experts = dst->src[3];
    const ggml_tensor *scores = dst->src[4], *chosen = dst->src[5];
    const float *expert_scales = vector_of(dst->src[6]), *dense_norm = vector_of(dst->src[2]);
    const float *mixture_norm = vector_of(dst->src[7]), *norm = vector_of(dst->src[8]);
    const float layer_scale = *vector_of(static_cast<const ggml_tensor*>(scale));
    const int64_t n_used = chosen->ne[0];
    const float eps = eps_of(dst);
    const int64_t n = dst->ne[0];
    const NextNorm next = next_norm_of(dst);
    static thread_local std::vector<float> scratch;
    scratch.resize(n + n_used);
    float *sum = scratch.data(), *weights = sum + n;
    const float score_scale = 1.0f / std::sqrt(static_cast<float>(n));
    for_range(x->ne[1], ith, nth, [&](int64_t t) {
        route_token(weights, scores, chosen, t, score_scale, expert_scales);
        std::fill_n(sum, n, 0.0f);
        for (int64_t i = 0; i < n_used; ++i) add_weighted(sum, row(experts, i, t), weights[i], n);
        const float* d = row(dense, t);
        const float dense_scale = norm_scale(d, n, eps), mixture_scale = norm_scale(sum, n, eps);
        for (int64_t i = 0; i < n; ++i)
            sum[i] = d[i] * dense_scale * dense_norm[i] + sum[i] * mixture_scale * mixture_norm[i];
        const float scale = norm_scale(sum, n, eps), *from = row(x, t);
        float* out = row(dst, t);
        for (int64_t i = 0; i < n; ++i) out[i] = (from[i] + sum[i] * scale * norm[i]) * layer_scale;
        if (!next.weight) return;
        write_normed_row(part_row(dst, next.begin, next.type, n, t), next.type, out, norm_scale(out, n, eps),
                         vector_of(next.weight), n);
    });
}

ggml_tensor* new_node(ggml_context* ctx, const ggml_tensor* shape, ggml_tensor** sources, int n_sources,
                      ggml_custom_op_t op, const float* eps, const char* name, void* userdata = nullptr,
                      ggml_type type = GGML_TYPE_F32) {
    ggml_tensor* node = ggml_custom_4d(ctx, type, shape->ne[0], shape->ne[1], shape->ne[2], 1, sources,
                                       n_sources, op, GGML_N_TASKS_MAX, userdata);
    node->extra = const_cast<float*>(eps);
    return ggml_set_name(node, name);
}

}  // namespace

float eps_of(const ggml_tensor* node) { return *static_cast<const float*>(node->extra); }

const ggml_tensor* layer_scale_of(const ggml_tensor* node) {
    return static_cast<const ggml_tensor*>(custom_parameters(node).userdata);
}

FusedOp fused_op_of(const ggml_tensor* node) {
    if (node->op != GGML_OP_CUSTOM) return FusedOp::none;
    const ggml_custom_op_t op = custom_parameters(node).fun;
    if (op == rows_op<compute_gelu_row>) return FusedOp::gated_gelu;
    if (op == rows_op<compute_norm_row>) return FusedOp::rms_norm;
    if (op == rows_op<compute_rotated_row>) return FusedOp::rotate_normed;
    if (op == rows_op<compute_stored_row>) return FusedOp::store_normed;
    if (op == rotate_and_store_op) return FusedOp::rotate_and_store;
    if (op == add_normed_op) return FusedOp::add_normed;
    if (op == end_attention_op) return FusedOp::end_attention;
    return op == join_branches_op ? FusedOp::join_branches : FusedOp::none;
}

ggml_tensor* gated_gelu(ggml_context* ctx, ggml_tensor* gate, ggml_tensor* up, ggml_type type) {
    ggml_tensor* sources[] = {gate, up};
    return new_node(ctx, gate, sources, 2, rows_op<compute_gelu_row>, nullptr, "gated_gelu", nullptr, type);
}

ggml_tensor* rms_norm(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weight, const float* eps,
                      ggml_type type) {
    ggml_tensor* sources[] = {x, weight};
    return new_node(ctx, x, sources, weight ? 2 : 1, rows_op<compute_norm_row>, eps, "rms_norm", nullptr,
                    type);
}

ggml_tensor* store_normed(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weight, ggml_tensor* angles,
                          const float* eps, ggml_tensor* target) {
    ggml_tensor* sources[] = {x, weight, angles};
    ggml_tensor* node = ggml_custom_inplace(ctx, target, sources, weight ? 3 : 1, rows_op<compute_stored_row>,
                                            GGML_N_TASKS_MAX, nullptr);
    node->extra = const_cast<float*>(eps);
    return ggml_set_name(node, "store_normed");
}

ggml_tensor* add_normed(ggml_context* ctx, ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight,
                        const float* eps) {
    ggml_tensor* sources[] = {x, branch, weight};
    return new_node(ctx, x, sources, 3, add_normed_op, eps, "add_normed");
}

AttentionEnd end_attention(ggml_context* ctx, ggml_tensor* x, ggml_tensor* branch, ggml_tensor* weight,
                           const BranchNorms& norms, const float* eps) {
    ggml_tensor* sources[] = {x, branch, weight, norms.dense, norms.router, norms.experts};
    const int64_t d = x->ne[0], n = x->ne[1];
    const AttentionEndParts parts = attention_end_parts(d, n, norms.dense_type, norms.for_repacked);
    const int64_t n_bytes = parts.packed + (norms.experts ? norms.packed_bytes : 0);
    ggml_tensor* node = ggml_custom_4d(
        ctx, GGML_TYPE_F32, d, rows_for(n_bytes, static_cast<int64_t>(ggml_row_size(GGML_TYPE_F32, d))), 1, 1,
        sources, norms.experts ? 6 : 5, end_attention_op, GGML_N_TASKS_MAX, nullptr);
    set_variant(node, norms.dense_type, norms.for_repacked);
    node->extra = const_cast<float*>(eps);
    ggml_set_name(node, "end_attention");
    return {
        view_part(ctx, node, 0, GGML_TYPE_F32, d, n),
        view_part(ctx, node, parts.dense, norms.dense_type, d, n),
        view_part(ctx, node, parts.router, GGML_TYPE_F32, d, n),
        norms.experts ? view_part(ctx, node, parts.packed, GGML_TYPE_I8, norms.packed_bytes, 1) : nullptr};
}

AttentionEndParts parts_of_attention_end(const ggml_tensor* node) {
    return attention_end_parts(node->ne[0], node->src[0]->ne[1], type_variant(node), order_variant(node));
}

NextNorm next_norm_of(const ggml_tensor* node) {
    return {node->src[kNextNorm], type_variant(node),
            after_part(0, static_cast<int64_t>(node->src[0]->ne[1] * node->nb[1]))};
}

Joined join_branches(ggml_context* ctx, ggml_tensor* x, const Branches& b, const float* eps) {
    ggml_tensor* sources[] = {x,        b.dense,         b.dense_norm,   b.experts, b.scores,
                              b.chosen, b.expert_scales, b.mixture_norm, b.norm};
    // ggml_custom_4d takes at most 9 sources.
    if (!b.next_norm)
        return {new_node(ctx, x, sources, 9, join_branches_op, eps, "join_branches", b.scale), nullptr};
    const int64_t d = x->ne[0], n = x->ne[1],
                  row_bytes = static_cast<int64_t>(ggml_row_size(GGML_TYPE_F32, d));
    const int64_t next = after_part(0, n * row_bytes);
    const int64_t n_bytes = next + n * static_cast<int64_t>(ggml_row_size(b.next_type, d));
    ggml_tensor* node = ggml_custom_4d(ctx, GGML_TYPE_F32, d, rows_for(n_bytes, row_bytes), 1, 1, sources, 9,
                                       join_branches_op, GGML_N_TASKS_MAX, b.scale);
    node->src[kNextNorm] = b.next_norm;
    set_variant(node, b.next_type, false);
    node->extra = const_cast<float*>(eps);
    ggml_set_name(node, "join_branches");
    return {view_part(ctx, node, 0, GGML_TYPE_F32, d, n), view_part(ctx, node, next, b.next_type, d, n)};
}

ggml_tensor* rotate_normed(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weight, ggml_tensor* angles,
                           const float* eps) {
    ggml_tensor* sources[] = {x, weight, angles};
    return new_node(ctx, x, sources, 3, rows_op<compute_rotated_row>, eps, "rotate_normed");
}

ggml_tensor* rotate_axes(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weight, ggml_tensor* angles,
                         const float* eps) {
    ggml_tensor* sources[] = {x, weight, angles};
    return new_node(ctx, x, sources, 3, rows_op<compute_axes_row>, eps, "rotate_axes");
}

ggml_tensor* limit(ggml_context* ctx, ggml_tensor* x, float low, float high) {
    ggml_tensor* node = new_node(ctx, x, &x, 1, rows_op<compute_limited_row>, nullptr, "limit");
    ggml_set_op_params_f32(node, kLowWord, low);
    ggml_set_op_params_f32(node, kHighWord, high);
    return node;
}

ggml_tensor* rotate_and_store(ggml_context* ctx, ggml_tensor* q, ggml_tensor* q_weight, ggml_tensor* angles,
                              const StoredHeads& stored, const float* eps, ggml_type type) {
    ggml_tensor* sources[] = {q,        q_weight,        angles,         stored.k, stored.k_weight,
                              stored.v, stored.k_target, stored.v_target};
    return new_node(ctx, q, sources, 8, rotate_and_store_op, eps, "rotate_and_store", nullptr, type);
}

ggml_tensor* stack_tokens(ggml_context* ctx, std::vector<ggml_tensor*> parts) {
    constexpr size_t kMaxParts = GGML_MAX_SRC - 1;  // the limit of ggml_custom_4d
    while (parts.size() > 1) {
        const size_t n = std::min(kMaxParts, parts.size());
        int64_t n_tokens = 0;
        for (size_t i = 0; i < n; ++i) n_tokens += parts[i]->ne[1];
        ggml_tensor* stack =
            ggml_custom_4d(ctx, GGML_TYPE_F32, parts[0]->ne[0], n_tokens, 1, 1, parts.data(),
                           static_cast<int>(n), rows_op<compute_stacked_row>, GGML_N_TASKS_MAX, nullptr);
        parts.erase(parts.begin() + 1, parts.begin() + static_cast<std::ptrdiff_t>(n));
        parts[0] = ggml_set_name(stack, "stack_tokens");
    }
    return parts[0];
}

ComputeRow row_function_of(const ggml_tensor* node) {
    if (node->op != GGML_OP_CUSTOM) return nullptr;
    const ggml_custom_op_t op = custom_parameters(node).fun;
    if (op == rows_op<compute_gelu_row>) return compute_gelu_row;
    if (op == rows_op<compute_norm_row>) return compute_norm_row;
    if (op == rows_op<compute_stacked_row>) return compute_stacked_row;
    if (op == rows_op<compute_limited_row>) return compute_limited_row;
    if (op == rows_op<compute_axes_row>) return compute_axes_row;
    return op == rows_op<compute_rotated_row> ? compute_rotated_row : nullptr;
}

void append_sources(std::vector<ggml_tensor*>& sources, ggml_tensor* x) {
    if (!row_function_of(x)) {
        sources.push_back(x);
        return;
    }
    for (int i = 0; i < GGML_MAX_SRC && x->src[i]; ++i) sources.push_back(x->src[i]);
}

}  // namespace pydiffusion
