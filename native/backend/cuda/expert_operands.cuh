// Operands of expert matmuls' nodes (expert_nodes.h), as launches read them.
#pragma once

#include "backend/cuda/expert_slots.cuh"
#include "backend/expert_nodes.h"

namespace pydiffusion {

namespace {

using namespace cuda;

static_assert(kPackedChunk == kChunk && kPackedChunkBytes == kXChunkBytes);

int32_t size(const ggml_tensor* t, int dimension) { return static_cast<int32_t>(t->ne[dimension]); }

const float* floats(const ggml_tensor* t) { return static_cast<const float*>(t->data); }

int64_t float_stride(const ggml_tensor* t, int dimension) { return t->nb[dimension] / sizeof(float); }

// Packed rows of n_values and, after them, their scales.
struct Packed {
    Packed(const ggml_tensor* node, int64_t n_values)
        : n_chunks(packed_chunks(n_values)),
          n_rows(node->ne[0] / (n_chunks * kXChunkBytes + static_cast<int64_t>(sizeof(float)))),
          rows(static_cast<unsigned char*>(node->data)),
          scales(reinterpret_cast<float*>(rows + n_rows * n_chunks * kXChunkBytes)) {}
    int64_t n_chunks, n_rows;
    unsigned char* rows;
    float* scales;
};

struct Grouped {
    Grouped(const ggml_tensor* node, int64_t n_slots, int64_t n_experts)
        : slots(static_cast<int32_t*>(node->data)),
          tiles(reinterpret_cast<SlotTile*>(slots + n_slots)),
          n_tiles(slots + n_slots + 3 * max_slot_tiles(n_experts, n_slots)) {}
    int32_t* slots;
    SlotTile* tiles;
    int32_t* n_tiles;
};

}  // namespace

}  // namespace pydiffusion
