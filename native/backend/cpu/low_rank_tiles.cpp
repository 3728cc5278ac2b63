// Low-rank changes by our tile kernels, on activations that are packed for the matrix anyway.
#include <algorithm>
#include <memory>

#include "backend/cpu/amx/pack.h"
#include "backend/cpu/amx/unpack.h"
#include "backend/cpu/low_rank_node.h"
#include "backend/cpu/matmul.h"

namespace pydiffusion {
namespace gemm {

namespace {

constexpr int64_t kPanelRows = 2 * kTileRows;
constexpr int64_t kTilesAtOnce = 16;  // of activations, for which a panel is unpacked once

// Per-thread buffers.
struct Workspace {
    alignas(64) uint16_t weights[2 * kDepth * kTileElements];
    alignas(64) float accumulators[2 * kTilesAtOnce * kAccumulatorElements];
    alignas(64) float rows[kTileRows * kTileRows];
};

Workspace& workspace() {
    static thread_local std::unique_ptr<Workspace> own(new Workspace);
    return *own;
}

Kernel kernel_of(const ggml_tensor* node) {
    return static_cast<Kernel>(reinterpret_cast<intptr_t>(custom_parameters(node).userdata));
}

// The tokens of a change, and the tiles of the graph's tokens that have any of them.
struct Tokens {
    int64_t first, n;

    int64_t first_tile() const { return first / kTileRows; }
    int64_t n_tiles() const { return n_tiles_of(first + n) - first_tile(); }
};

Tokens tokens_of(const ggml_tensor* node) { return {low_rank::first_of(node), low_rank::count_of(node)}; }

// Multiplies a panel of rows of a factor with n_tiles tiles of activations, into the workspace.
void multiply_panel(Kernel kernel, const ggml_tensor* factor, int64_t row, const PackedBlock& block,
                    int64_t first_tile, int64_t n_tiles) {
    Workspace& ws = workspace();
    const int64_t n_rows = std::min(kPanelRows, factor->ne[1] - row);
    const char* data = static_cast<const char*>(factor->data) + row * factor->nb[1];
    for (int64_t d = 0; d < block.depth; d += kDepth) {
        const Rows rows = {factor->type, data, factor->nb[1], n_rows, d * kTileDepth, block.elements_at(d)};
        unpack(rows, ws.weights, {});
        const int64_t depth = depth_of(rows.n);
        const TileOperands operands = {ws.weights, depth * kTileElements, block.at(first_tile, d),
                                       block.activation_stride(d), ws.accumulators};
        tile_gemm(kernel, operands, n_tiles_of(n_rows), n_tiles, depth, d > 0);
    }
}

// Packs a panel's results, times scale, of one tile of activations: they are elements of activations again.
void pack_results(const float* accumulators, int64_t n_row_tiles, float scale, uint16_t* tile) {
    for (int64_t pair = 0; pair < kTileRows; ++pair) {
        const int64_t row_tile = 2 * pair / kTileRows;
        const float* rows = accumulators + row_tile * kAccumulatorElements + 2 * pair % kTileRows * kTileRows;
        for (int64_t c = 0; c < kTileRows; ++c) {
            for (int64_t i = 0; i < 2; ++i) {
                const float value = row_tile < n_row_tiles ? scale * rows[i * kTileRows + c] : 0.0f;
                tile[(pair * kTileRows + c) * 2 + i] = ggml_fp32_to_bf16(value).bits;
            }
        }
    }
}

PackedBlock inner_block(const ggml_tensor* inner) {
    return {align(static_cast<uint16_t*>(inner->data)), inner->src[0]->ne[1], tokens_of(inner).n_tiles()};
}

// dst = scale * (a x), packed.
void inner_op(ggml_tensor* dst, int ith, int nth, void*) {
    const ggml_tensor *a = dst->src[0], *packed = dst->src[1];
    const KernelScope scope(kernel_of(dst));
    const float scale = low_rank::scale_of(dst);
    const Tokens tokens = tokens_of(dst);
    const PackedBlock block = block_of(packed, 0, n_tiles_of(packing_of(packed).x->ne[1])),
                      result = inner_block(dst);
    const int64_t end = tokens.n_tiles() * (ith + 1) / nth;
    for (int64_t tile = tokens.n_tiles() * ith / nth; tile < end; tile += kTilesAtOnce) {
        const int64_t n_tiles = std::min(kTilesAtOnce, end - tile);
        for (int64_t row = 0; row < a->ne[1]; row += kPanelRows) {
            multiply_panel(kernel_of(dst), a, row, block, tokens.first_tile() + tile, n_tiles);
            const int64_t n_row_tiles = n_tiles_of(std::min(kPanelRows, a->ne[1] - row));
            const int64_t d = row / kTileDepth, d_block = d / kDepth * kDepth;
            for (int64_t i = 0; i < n_tiles; ++i)
                pack_results(workspace().accumulators + 2 * i * kAccumulatorElements, n_row_tiles, scale,
                             result.at(tile + i, d_block) + (d - d_block) * kTileElements);
        }
    }
}

// Adds a panel's results of one tile of activations, the first of which is of `token`.
void add_results(ggml_tensor* dst, const float* accumulators, const Tokens& tokens, int64_t token,
                 int64_t row) {
    float* targets[kTileRows];
    float* rows = workspace().rows;
    for (int64_t c = 0; c < kTileRows; ++c) targets[c] = rows + c * kTileRows;
    const int64_t end = std::min(dst->ne[0], row + kPanelRows);
    for (int64_t i = 0; row < end; row += kTileRows, ++i) {
        const int64_t n_rows = std::min(kTileRows, end - row);
        store_tile(accumulators + i * kAccumulatorElements, n_rows, targets, kTileRows);
        for (int64_t c = 0; c < kTileRows; ++c) {
            if (token + c < tokens.first || token + c >= tokens.first + tokens.n) continue;
            float* y =
                reinterpret_cast<float*>(static_cast<char*>(dst->data) + (token + c) * dst->nb[1]) + row;
            for (int64_t r = 0; r < n_rows; ++r) y[r] += rows[c * kTileRows + r];
        }
    }
}

// dst [n_rows, n_tokens], in place of src[0], += b u.
void outer_op(ggml_tensor* dst, int ith, int nth, void*) {
    const ggml_tensor *inner = dst->src[1], *b = dst->src[2];
    const KernelScope scope(kernel_of(dst));
    const Tokens tokens = tokens_of(inner);
    const PackedBlock block = inner_block(inner);
    const int64_t n_panels = (b->ne[1] + kPanelRows - 1) / kPanelRows;
    for (int64_t panel = n_panels * ith / nth; panel < n_panels * (ith + 1) / nth; ++panel) {
        const int64_t row = panel * kPanelRows;
        for (int64_t tile = 0; tile < block.n_tiles; tile += kTilesAtOnce) {
            const int64_t n_tiles = std::min(kTilesAtOnce, block.n_tiles - tile);
            multiply_panel(kernel_of(dst), b, row, block, tile, n_tiles);
            for (int64_t i = 0; i < n_tiles; ++i)
                add_results(dst, workspace().accumulators + 2 * i * kAccumulatorElements, tokens,
                            (tokens.first_tile() + tile + i) * kTileRows, row);
        }
    }
}

}  // namespace

ggml_tensor* Matmul::add_low_rank(const LowRank& change, ggml_tensor* x, ggml_tensor* result) {
    void* kernel = reinterpret_cast<void*>(static_cast<intptr_t>(kernel_));
    const Tokens tokens = {change.first, change.n};
    constexpr int64_t alignment_padding = kCacheLine / sizeof(uint16_t);
    ggml_tensor* operands[] = {change.a, packed(x, nullptr, 0)};
    ggml_tensor* inner =
        ggml_custom_4d(ctx_, GGML_TYPE_BF16,
                       depth_of(change.a->ne[1]) * tokens.n_tiles() * kTileElements + alignment_padding, 1, 1,
                       1, operands, 2, inner_op, GGML_N_TASKS_MAX, kernel);
    low_rank::set_tokens(inner, tokens.first, tokens.n);
    low_rank::set_scale(inner, change.scale);
    ggml_set_name(inner, "low_rank_inner_tiles");
    ggml_tensor* factors[] = {inner, change.b};
    ggml_tensor* sum = ggml_custom_inplace(ctx_, result, factors, 2, outer_op, GGML_N_TASKS_MAX, kernel);
    low_rank::set_tokens(sum, tokens.first, tokens.n);
    return ggml_set_name(sum, "add_low_rank_tiles");
}

}  // namespace gemm
}  // namespace pydiffusion
