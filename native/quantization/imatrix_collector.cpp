#include "quantization/imatrix_collector.h"

namespace pydiffusion {

namespace {

void keep(const ggml_tensor* operand) {
    auto* tensor = const_cast<ggml_tensor*>(operand);  // the graph is still under construction
    if (!tensor) return;
    ggml_set_output(tensor);
    if (tensor->view_src) ggml_set_output(tensor->view_src);
}

const char* at(const ggml_tensor* t, int64_t i0, int64_t i1, int64_t i2) {
    return static_cast<const char*>(t->data) + i0 * t->nb[0] + i1 * t->nb[1] + i2 * t->nb[2];
}

}  // namespace

gemm::MatmulOperands ImatrixCollector::wanted_operands(const ggml_tensor* node) const {
    const gemm::MatmulOperands operands = gemm::matmul_operands(node);
    return operands.weight && is_wanted_(operands.weight) ? operands : gemm::MatmulOperands();
}

void ImatrixCollector::keep_inputs(ggml_cgraph* graph) const {
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const gemm::MatmulOperands operands = wanted_operands(ggml_graph_node(graph, i));
        keep(operands.x);
        keep(operands.experts);
    }
}

void ImatrixCollector::add(ggml_cgraph* graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const gemm::MatmulOperands operands = wanted_operands(ggml_graph_node(graph, i));
        if (operands.weight) add_matmul(operands);
    }
}

void ImatrixCollector::add_matmul(const gemm::MatmulOperands& operands) {
    // Not structured bindings: in C++17 a lambda can't capture them.
    const ggml_tensor *weight = operands.weight, *x = operands.x, *experts = operands.experts;
    ImatrixEntry& entry = by_weight_[weight->name];
    if (entry.sums.empty()) {
        entry.n_per_row = weight->ne[0];
        entry.counts.resize(weight->ne[2]);
        entry.sums.resize(weight->ne[0] * weight->ne[2]);
    }
    const auto add_row = [&](int64_t matrix, int64_t i1, int64_t i2) {
        const auto* row = reinterpret_cast<const float*>(at(x, 0, i1, i2));
        double* sums = entry.sums.data() + matrix * entry.n_per_row;
        for (int64_t c = 0; c < entry.n_per_row; ++c) sums[c] += static_cast<double>(row[c]) * row[c];
        entry.counts[matrix] += 1;
    };
    if (!experts) {
        for (int64_t i1 = 0; i1 < x->ne[1]; ++i1) add_row(0, i1, 0);
        return;
    }
    // x [n_per_row, 1 or n_used, n_tokens], experts I32 [n_used, n_tokens]
    for (int64_t token = 0; token < x->ne[2]; ++token) {
        for (int64_t used = 0; used < experts->ne[0]; ++used) {
            const int32_t expert = *reinterpret_cast<const int32_t*>(at(experts, used, token, 0));
            add_row(expert, used % x->ne[1], token);
        }
    }
}

}  // namespace pydiffusion
