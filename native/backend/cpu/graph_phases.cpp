#include "backend/cpu/graph_phases.h"

#include "backend/cpu/custom_node.h"
#include "ggml-impl.h"

// Of vendor/patches/0002, in ggml-cpu.c.
extern "C" {
void ggml_cpu_compute_part(ggml_tensor* node, const ggml_cplan* plan, int stage, int ith, int nth);
void ggml_threadpool_chunk_set(ggml_threadpool* pool, int value);
}

namespace pydiffusion {

namespace {

constexpr int kWhole = 0, kPrepare = 1, kMain = 2;

// On ARM ggml's dot products of two rows are rounded as the rows are paired, which depends on the parts.
#if defined(__x86_64__) || defined(_M_X64)
constexpr Split kSplitOfMatmuls = Split::by_thread;
#else
constexpr Split kSplitOfMatmuls = Split::as_planned;
#endif

bool is_computed(const ggml_tensor* node) {
    switch (node->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return false;
        default:
            return (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 && !ggml_is_empty(node);
    }
}

// Ops that ggml splits by rows or elements, into any number of parts and without barriers; those that it
// computes in one part nevertheless leave the others empty.
bool is_split_freely(ggml_op op) {
    switch (op) {
        case GGML_OP_DUP:
        case GGML_OP_ADD:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
        case GGML_OP_CONCAT:
        case GGML_OP_RMS_NORM:
        case GGML_OP_SCALE:
        case GGML_OP_CPY:
        case GGML_OP_CONT:
        case GGML_OP_GET_ROWS:
        case GGML_OP_SET_ROWS:
        case GGML_OP_SOFT_MAX:
        case GGML_OP_ROPE:
        case GGML_OP_ARGSORT:
        case GGML_OP_UNARY:
        case GGML_OP_GLU:
        case GGML_OP_PAD:
            return true;
        default:
            return false;
    }
}

void append(std::vector<Phase>& phases, ggml_tensor* node) {
    switch (node->op) {
        case GGML_OP_CUSTOM: {
            const bool is_split = custom_parameters(node).n_tasks == GGML_N_TASKS_MAX;
            phases.push_back({node, kWhole, is_split ? Split::finely : Split::none});
            return;
        }
        case GGML_OP_MUL_MAT:
            if (node->src[1]->type != ggml_get_type_traits_cpu(node->src[0]->type)->vec_dot_type)
                phases.push_back({node, kPrepare, kSplitOfMatmuls});
            for (int64_t matrix = 0; matrix < node->ne[2] * node->ne[3]; ++matrix)
                phases.push_back({node, kMain + static_cast<int>(matrix), kSplitOfMatmuls});
            return;
        case GGML_OP_MUL_MAT_ID:
            phases.push_back({node, kPrepare, kSplitOfMatmuls});
            phases.push_back({node, kMain, kSplitOfMatmuls});
            return;
        case GGML_OP_FLASH_ATTN_EXT:
            phases.push_back({node, kPrepare, Split::as_planned});
            phases.push_back({node, kMain, Split::as_planned});
            return;
        default:  // one thread computes what may have barriers
            phases.push_back({node, kWhole, is_split_freely(node->op) ? Split::by_thread : Split::none});
    }
}

}  // namespace

std::vector<Phase> phases_of(ggml_cgraph* graph) {
    std::vector<Phase> phases;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        ggml_tensor* node = ggml_graph_node(graph, i);
        if (is_computed(node)) append(phases, node);
    }
    return phases;
}

int n_pieces_of(const Phase& phase, int n_threads, const ggml_cplan& plan) {
    switch (phase.split) {
        case Split::none:
            return 1;
        case Split::by_thread:
            return n_threads;
        case Split::finely:
            return n_threads == 1 ? 1 : kPiecesPerThread * n_threads;
        case Split::as_planned:
            return plan.n_threads;
    }
    return 1;
}

void begin_phase(const ggml_cplan& plan, int n_pieces) {
    ggml_threadpool_chunk_set(plan.threadpool, n_pieces);
}

void compute_piece(const Phase& phase, const ggml_cplan& plan, int piece, int n_pieces) {
    ggml_cpu_compute_part(phase.node, &plan, phase.stage, piece, n_pieces);
}

}  // namespace pydiffusion
