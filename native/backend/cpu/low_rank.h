// Low-rank changes of matrices: what adapters (LoRA) add to the results of matmuls.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "ggml.h"

namespace pydiffusion {

// Adds b (scale * (a x)) to a matrix's results for the tokens [first, first + n) of a graph. a and b are F32
// or BF16.
struct LowRank {
    ggml_tensor* a;  // [n_inner, rank], of experts [n_inner, rank, n_expert]
    ggml_tensor* b;  // [rank, n_rows], of experts [rank, n_rows, n_expert]
    float scale;
    int64_t first, n;
};

// By matrix, the changes of its results: in order of their tokens, those of the same tokens in the order in
// which they are added. Two ranges of tokens are the same or have no token in common.
using LowRankTable = std::unordered_map<const ggml_tensor*, std::vector<LowRank>>;

// Adds the change to result [n_rows, n_tokens], F32, in place, for x F32 [n_inner, n_tokens]: nodes for the
// CPU. chosen: null, or the experts of each token, I32 [n_used, n_tokens]; then result is [n_rows, n_used,
// n_tokens], x [n_inner, 1 or n_used, n_tokens]. Unlike ggml's matmuls they split few rows among threads, and
// add while they multiply. Sums are float32; each element depends on its own row and activation only.
ggml_tensor* add_low_rank(ggml_context* ctx, const LowRank& change, ggml_tensor* x, ggml_tensor* result,
                          ggml_tensor* chosen = nullptr);

// Work of a node of a change on the CPU, of these or of our tile kernels: a or b times n rows. factor is null
// for other nodes.
struct LowRankWork {
    const ggml_tensor* factor = nullptr;
    int64_t n = 0;
};
LowRankWork low_rank_work(const ggml_tensor* node);

}  // namespace pydiffusion
