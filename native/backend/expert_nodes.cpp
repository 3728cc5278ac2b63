#include "backend/expert_nodes.h"

#include <cstring>
#include <vector>

#include "backend/cpu/custom_node.h"
#include "backend/cpu/fused_rows.h"
#include "backend/repacked_weights.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

// Identify kinds of nodes that only devices compute, which never call them.
template <ExpertNode kind>
void only_on_devices(ggml_tensor*, int, int, void*) {
    GGML_ABORT("an expert matmul's node %d has no implementation for the CPU", static_cast<int>(kind));
}

template <ExpertNode kind>
ggml_tensor* new_node(ggml_context* ctx, ggml_type type, const std::vector<int64_t>& ne,
                      std::vector<ggml_tensor*> sources, const char* name, int64_t userdata = 0) {
    ggml_tensor* node =
        ggml_custom_4d(ctx, type, ne[0], ne[1], ne[2], 1, sources.data(), static_cast<int>(sources.size()),
                       only_on_devices<kind>, 1, reinterpret_cast<void*>(static_cast<intptr_t>(userdata)));
    return ggml_set_name(node, name);
}

}  // namespace

int64_t n_expert_of(const ggml_tensor* node) {
    return static_cast<int64_t>(reinterpret_cast<intptr_t>(custom_parameters(node).userdata));
}

bool is_for_repacked(const ggml_tensor* node) { return custom_parameters(node).userdata != nullptr; }

ExpertNode expert_node_of(const ggml_tensor* node) {
    if (node->op != GGML_OP_CUSTOM) return ExpertNode::none;
    const ggml_custom_op_params parameters = custom_parameters(node);
    if (parameters.fun == only_on_devices<ExpertNode::pack>) return ExpertNode::pack;
    if (parameters.fun == only_on_devices<ExpertNode::pack_normed>) return ExpertNode::pack_normed;
    if (parameters.fun == only_on_devices<ExpertNode::pack_gated>) return ExpertNode::pack_gated;
    if (parameters.fun == only_on_devices<ExpertNode::group>) return ExpertNode::group;
    if (parameters.fun == only_on_devices<ExpertNode::multiply>) return ExpertNode::multiply;
    if (parameters.fun == only_on_devices<ExpertNode::multiply_gated>) return ExpertNode::multiply_gated;
    return ExpertNode::none;
}

ggml_tensor* ExpertMatmuls::packed(ggml_tensor* x, bool for_repacked) {
    ggml_tensor*& packed = packed_[{x, for_repacked}];
    if (packed) return packed;
    const std::vector<int64_t> ne = {packed_bytes(ggml_nrows(x), x->ne[0]), 1, 1};
    const ggml_tensor* made =
        x->op == GGML_OP_RESHAPE ? x->src[0] : x;  // each row is that of the same number
    if (fused_op_of(made) == FusedOp::rms_norm && made->src[1]) {
        packed = new_node<ExpertNode::pack_normed>(ctx_, GGML_TYPE_I8, ne, {made->src[0], made->src[1]},
                                                   "pack_normed", for_repacked);
        packed->extra = made->extra;  // epsilon
    } else if (fused_op_of(made) == FusedOp::gated_gelu) {
        packed = new_node<ExpertNode::pack_gated>(ctx_, GGML_TYPE_I8, ne, {made->src[0], made->src[1]},
                                                  "pack_gated", for_repacked);
    } else {
        packed = new_node<ExpertNode::pack>(ctx_, GGML_TYPE_I8, ne, {x}, "pack", for_repacked);
    }
    return packed;
}

ggml_tensor* ExpertMatmuls::grouped(ggml_tensor* experts, int64_t n_expert) {
    ggml_tensor*& grouped = grouped_[experts];
    if (grouped) return grouped;
    const int64_t n_slots = ggml_nelements(experts), n_tiles = max_slot_tiles(n_expert, n_slots);
    grouped = new_node<ExpertNode::group>(ctx_, GGML_TYPE_I32, {n_slots + 3 * n_tiles + 1, 1, 1}, {experts},
                                          "group_slots", n_expert);
    return grouped;
}

ggml_tensor* ExpertMatmuls::apply(ggml_tensor* weights, ggml_tensor* x, ggml_tensor* experts) {
    if (!backend_.multiplies_experts(weights, experts)) {
        if (!is_repacked(weights)) return nullptr;
        throw Error(ErrorKind::out_of_memory,  // a batch is then halved
                    format("%lld tokens in one graph are too many for the expert matmuls of %s: use fewer "
                           "sequences at a time",
                           static_cast<long long>(experts->ne[1]), backend_.name()));
    }
    return multiply(weights, packed(x, is_repacked(weights)), experts);
}

ggml_tensor* ExpertMatmuls::multiply(ggml_tensor* weights, ggml_tensor* packed_x, ggml_tensor* experts) {
    return new_node<ExpertNode::multiply>(
        ctx_, GGML_TYPE_F32, {weights->ne[1], experts->ne[0], experts->ne[1]},
        {weights, packed_x, grouped(experts, weights->ne[2]), experts}, "device_expert_matmul");
}

ggml_tensor* ExpertMatmuls::apply_gated(ggml_tensor* gate_up, ggml_tensor* down, ggml_tensor* x,
                                        ggml_tensor* experts) {
    const int64_t n_ff = down->ne[0];
    if (!is_repacked(gate_up) || !is_repacked(down) || gate_up->ne[1] != 2 * n_ff || n_ff % kRepackedRows ||
        !backend_.multiplies_experts(gate_up, experts) || !backend_.multiplies_experts(down, experts))
        return nullptr;
    const bool for_repacked = true;
    ggml_tensor* gated = new_node<ExpertNode::multiply_gated>(
        ctx_, GGML_TYPE_I8, {packed_bytes(ggml_nelements(experts), n_ff), 1, 1},
        {gate_up, packed(x, for_repacked), grouped(experts, gate_up->ne[2]), experts},
        "device_gated_expert_matmul", for_repacked);
    return multiply(down, gated, experts);
}

}  // namespace pydiffusion
