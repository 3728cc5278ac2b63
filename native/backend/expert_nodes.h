// Expert matmuls by a device's own kernels, as nodes: activations are packed and slots (a token and one of
// its experts each) grouped by expert once for all matmuls that use them.
#pragma once

#include <map>
#include <tuple>
#include <utility>

#include "backend/backend.h"
#include "ggml.h"

namespace pydiffusion {

class ExpertMatmuls {
  public:
    // Both must live as long as the graph is built.
    ExpertMatmuls(ggml_context* ctx, const Backend& backend) : ctx_(ctx), backend_(backend) {}

    // weights [n_inner, n_rows, n_expert], x F32 [n_inner, 1 or n_used, n_tokens], experts I32 [n_used,
    // n_tokens] -> F32 [n_rows, n_used, n_tokens]. Null if the device has no kernels for this. If x is an RMS
    // norm or a gated GELU of fused_rows.h, it is computed while it is packed, and is no node of the graph.
    ggml_tensor* apply(ggml_tensor* weights, ggml_tensor* x, ggml_tensor* experts);

    // down * (gelu(gate) * up), where gate_up [n_inner, 2 * n_ff, n_expert] has gate's rows, then up's, and
    // down is [n_ff, n_rows, n_expert]. Null if the device has no kernel that multiplies by gate_up and
    // gates.
    ggml_tensor* apply_gated(ggml_tensor* gate_up, ggml_tensor* down, ggml_tensor* x, ggml_tensor* experts);
    // Whether apply() will give a result for n_used experts of n_tokens tokens.
    bool multiplies(const ggml_tensor* weights, int64_t n_used, int64_t n_tokens) const;
    // From now on rms_norm(x, norm) is packed already, by another node.
    void add_packed(const ggml_tensor* x, const ggml_tensor* norm, bool for_repacked, ggml_tensor* packed) {
        packed_norms_[{x, norm, for_repacked}] = packed;
    }

  private:
    ggml_tensor* packed(ggml_tensor* x, bool for_repacked);
    ggml_tensor* multiply(ggml_tensor* weights, ggml_tensor* packed_x, ggml_tensor* experts);
    ggml_tensor* grouped(ggml_tensor* experts, int64_t n_expert);

    ggml_context* ctx_;
    const Backend& backend_;
    std::map<std::pair<const ggml_tensor*, bool>, ggml_tensor*> packed_;
    std::map<std::tuple<const ggml_tensor*, const ggml_tensor*, bool>, ggml_tensor*> packed_norms_;
    std::map<const ggml_tensor*, ggml_tensor*> grouped_;
};

// multiply_gated gates what it has multiplied, and packs that.
enum class ExpertNode { none, pack, pack_normed, pack_gated, group, multiply, multiply_gated };
ExpertNode expert_node_of(const ggml_tensor* node);
int64_t n_expert_of(const ggml_tensor* node);     // of a group node
bool is_for_repacked(const ggml_tensor* packed);  // packed activations: in the order for repacked weights

// Limits of the devices' kernels that choose experts and join them (top_k.h, join_branches).
constexpr int64_t kMaxDeviceExperts = 1024, kMaxDeviceExpertsUsed = 128;

// Packed activations: per row n_chunks chunks of kPackedChunkBytes, each for kPackedChunk values; then one
// float per row, by which it is to be multiplied.
constexpr int64_t kPackedChunk = 256, kPackedChunkBytes = 576;
inline int64_t packed_chunks(int64_t n_values) { return (n_values + kPackedChunk - 1) / kPackedChunk; }
inline int64_t packed_bytes(int64_t n_rows, int64_t n_values) {
    return n_rows * (packed_chunks(n_values) * kPackedChunkBytes + static_cast<int64_t>(sizeof(float)));
}

// Grouped slots, as I32: the slots by expert; kTileSlots or fewer at a time, tiles of (expert, first, n);
// the number of tiles.
constexpr int64_t kTileSlots = 24;
inline int64_t max_slot_tiles(int64_t n_expert, int64_t n_slots) { return n_expert + n_slots / kTileSlots; }

}  // namespace pydiffusion
