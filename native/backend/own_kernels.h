// Kernels of our own in ggml's CUDA backend: attention (attention_node.h), expert matmuls (expert_nodes.h) of
// Q4_K, Q6_K and Q8_0, an MLP beside them (mlp_beside.h), and the fused rows of fused_rows.h and top_k.h.
#pragma once

#include <memory>

#include "ggml-backend.h"

namespace pydiffusion {

// Lets a CUDA backend compute their nodes, until the result is destroyed. Null if the GPU can't run the
// expert matmuls (compute capability 8.0 or newer), or not with several blocks on a multiprocessor unless
// wherever_possible.
std::shared_ptr<void> use_own_kernels(ggml_backend_t backend, bool wherever_possible);

// Whether these expert weights are to be repacked for them. kernels: from use_own_kernels().
bool repacks_experts(const void* kernels, const ggml_tensor* weights);

// Whether there are kernels for attention_node.h. kernels: from use_own_kernels().
bool has_attention(const void* kernels);

// From now on the MLP is computed before what follows it instead of beside it: for graphs that end in
// between. kernels: from use_own_kernels().
void compute_in_turn(void* kernels, bool in_turn);

// Whether they have the type and the sizes of an expert matmul: weights [n_inner, n_rows, n_expert], experts
// [n_used, n_tokens]. Not of few tokens, for which ggml's kernels are faster.
bool can_multiply_experts(const ggml_tensor* weights, const ggml_tensor* experts);

// Of a GPU, 100 times the major plus 10 times the minor number: 900 for an H100.
int compute_capability(ggml_backend_dev_t gpu);

}  // namespace pydiffusion
