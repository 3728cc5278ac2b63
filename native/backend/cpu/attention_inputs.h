// AttentionInputs: tensors of an attention node, accessed by KV head and query. For both CPU kernels.
#pragma once

#include <algorithm>
#include <cstring>

#include "backend/cpu/attention.h"
#include "backend/cpu/fused_rows.h"
#include "ggml-cpu.h"

namespace pydiffusion {

struct AttentionInputs {
    ggml_tensor* dst;
    const ggml_tensor *k, *v, *q;
    ComputeRow compute_query;  // set: q is not allocated, its rows are computed on demand; null: q is a node
    const Causal* causal;

    explicit AttentionInputs(ggml_tensor* out, const void* userdata)
        : dst(out),
          k(out->src[0]),
          v(out->src[1]),
          q(static_cast<const ggml_tensor*>(out->extra)),
          compute_query(out->src[2] == q ? nullptr : row_function_of(q)),
          causal(static_cast<const Causal*>(userdata)) {}

    int64_t head_dim() const { return q->ne[0]; }
    int64_t n_rows() const { return k->ne[1]; }
    int64_t n_heads() const { return k->ne[2]; }              // KV heads
    int64_t group() const { return q->ne[1] / k->ne[2]; }     // query heads per KV head
    int64_t n_queries() const { return group() * q->ne[2]; }  // per KV head

    // Query i of a KV head: token i / group(), head i % group(). May be computed into `scratch` [head_dim].
    const float* query(int64_t head, int64_t i, float* scratch) const {
        if (!compute_query) return at<float>(q, q->nb[1], q->nb[2], head, i);
        compute_query(q, head * group() + i % group(), i / group(), scratch);
        return scratch;
    }
    float* output(int64_t head, int64_t i) const {
        return at<float>(dst, head_dim() * sizeof(float), dst->nb[1], head, i);
    }

    // Rows that query i sees.
    Causal::Rows visible(int64_t i) const {
        if (!causal) return {0, static_cast<int32_t>(n_rows() - 1)};
        return causal->visible(static_cast<int32_t>(i / group()));
    }

    // Converts rows of K or V to floats [n][head_dim].
    void load_rows(float* out, const ggml_tensor* rows, int64_t head, int64_t begin, int64_t n) const {
        const ggml_to_float_t to_float = ggml_get_type_traits(rows->type)->to_float;
        const int64_t dim = head_dim();
        for (int64_t r = 0; r < n; ++r, out += dim) {
            const char* row =
                static_cast<const char*>(rows->data) + (begin + r) * rows->nb[1] + head * rows->nb[2];
            if (rows->type == GGML_TYPE_F16) {  // vectorized; to_float is not
                ggml_cpu_fp16_to_fp32(reinterpret_cast<const ggml_fp16_t*>(row), out, dim);
            } else if (to_float) {
                to_float(row, out, dim);
            } else {
                std::memcpy(out, row, dim * sizeof(float));
            }
        }
    }

  private:
    template <typename T>
    T* at(const ggml_tensor* t, size_t head_bytes, size_t token_bytes, int64_t head, int64_t i) const {
        return reinterpret_cast<T*>(static_cast<char*>(t->data) +
                                    (head * group() + i % group()) * head_bytes + i / group() * token_bytes);
    }
};

constexpr float kInitialMaximum = -1e30f;  // initial running maximum of a query

}  // namespace pydiffusion
