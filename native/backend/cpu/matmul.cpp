#include "backend/cpu/matmul.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "backend/cpu/amx/pack.h"
#include "backend/cpu/amx/unpack.h"
#include "backend/cpu/custom_node.h"
#include "backend/cpu/packed_activations.h"

namespace pydiffusion {
namespace gemm {

namespace {

// Cache blocking: a panel of 32 rows of weights, 256 elements deep, is unpacked (16 KiB, for L1) and
// multiplied with the same elements of up to 1024 activations (512 KiB, for L2), or 512 with AVX-512, for
// which unpacking costs less beside the multiplication. These stay in L2 for up to 8 panels, as many as fit
// the accumulators (256 KiB).
constexpr int64_t kPanelRows = 2 * kTileRows;
constexpr int64_t kMaxPanels = 8;
constexpr int64_t kFewTiles = 4;
constexpr int64_t kMaxPairs = 128;  // of accumulator tiles

int64_t max_tiles(Kernel kernel) { return kernel == Kernel::amx ? 64 : 32; }  // of activations

int64_t n_panels_for(Kernel kernel, int64_t n_tiles) {
    // Few activations fit L2 at full depth; then weights are read sequentially.
    return n_tiles <= kFewTiles ? 1
                                : std::clamp(kMaxPairs / n_tiles, kMaxPairs / max_tiles(kernel), kMaxPanels);
}

// Per-thread buffers.
struct Workspace {
    alignas(64) uint16_t weights[2 * kDepth * kTileElements];
    alignas(64) float accumulators[kMaxPairs * 2 * kAccumulatorElements];
    std::vector<float> rows;  // activations that are computed while they are packed
};

Workspace& workspace() {
    static thread_local std::unique_ptr<Workspace> own(new Workspace);
    return *own;
}

Kernel kernel_of(void* userdata) { return static_cast<Kernel>(reinterpret_cast<intptr_t>(userdata)); }

const float* activation(const ggml_tensor* t, int64_t i1, int64_t i2 = 0) {
    return reinterpret_cast<const float*>(static_cast<const char*>(t->data) + i1 * t->nb[1] + i2 * t->nb[2]);
}

float* activation(ggml_tensor* t, int64_t i1, int64_t i2 = 0) {
    return const_cast<float*>(activation(static_cast<const ggml_tensor*>(t), i1, i2));
}

// --- activations of experts ---

// An activation is an entry (used, token) of the table of chosen experts. Those of one expert are contiguous
// and start at a tile boundary. Data of a node I32 [n_activations + 2 * (n_expert + 1)].
struct ExpertGroups {
    ExpertGroups(const ggml_tensor* groups, int64_t n_activations)
        : activations(static_cast<int32_t*>(groups->data)),
          begin(activations + n_activations),
          begin_tile(begin + (groups->ne[0] - n_activations) / 2) {}

    int32_t* activations;  // by expert: token * n_used + used
    int32_t* begin;        // [n_expert + 1] in activations
    int32_t* begin_tile;   // [n_expert + 1]
};

void group_by_expert_op(ggml_tensor* dst, int, int, void*) {
    const ggml_tensor* experts = dst->src[0];
    const int64_t n_used = experts->ne[0], n = ggml_nelements(experts), n_expert = (dst->ne[0] - n) / 2 - 1;
    const ExpertGroups groups(dst, n);
    const auto expert_of = [&](int64_t i) {
        return *reinterpret_cast<const int32_t*>(static_cast<const char*>(experts->data) +
                                                 i % n_used * experts->nb[0] + i / n_used * experts->nb[1]);
    };
    std::fill_n(groups.begin, n_expert + 1, 0);
    for (int64_t i = 0; i < n; ++i) groups.begin[expert_of(i) + 1] += 1;
    groups.begin_tile[0] = 0;
    for (int64_t e = 0; e < n_expert; ++e) {
        groups.begin_tile[e + 1] =
            groups.begin_tile[e] + static_cast<int32_t>(n_tiles_of(groups.begin[e + 1]));
        groups.begin[e + 1] += groups.begin[e];
    }
    std::vector<int32_t> next(groups.begin, groups.begin + n_expert);
    for (int64_t i = 0; i < n; ++i) groups.activations[next[expert_of(i)]++] = static_cast<int32_t>(i);
}

int64_t max_expert_tiles(int64_t n_activations, int64_t n_expert) {
    return n_activations / kTileRows + std::min(n_expert, n_activations);
}

// --- packing ---

// Indices of a tile's activations: column c is x[:, i1[c], i2[c]], and zeros from n on.
struct TileIndices {
    int64_t n = 0, i1[kTileRows], i2[kTileRows];
    void add(int64_t a, int64_t b) {
        i1[n] = a;
        i2[n++] = b;
    }
};

void pack_tile(const PackedBlock& block, int64_t i_tile, const Packing& packing, const TileIndices& indices) {
    const ggml_tensor* x = packing.x;
    const float* activations[kTileRows] = {};
    std::vector<float>& scratch = workspace().rows;
    if (packing.compute_row) scratch.resize(kTileRows * x->ne[0]);
    for (int64_t c = 0; c < indices.n; ++c) {
        if (!packing.compute_row) {
            activations[c] = activation(x, indices.i1[c], indices.i2[c]);
            continue;
        }
        float* row = scratch.data() + c * x->ne[0];
        packing.compute_row(x, indices.i1[c], indices.i2[c], row);
        activations[c] = row;
    }
    for (int64_t d = 0; d < block.depth; d += kDepth) {
        const float* from[kTileRows];
        for (int64_t c = 0; c < kTileRows; ++c)
            from[c] = activations[c] ? activations[c] + d * kTileDepth : nullptr;
        pack_activations(from, block.elements_at(d), block.at(i_tile, d));
    }
}

void pack_op(ggml_tensor* dst, int ith, int nth, void*) {
    const Packing& packing = packing_of(dst);
    const int64_t n_activations = packing.x->ne[1], n_tiles = n_tiles_of(n_activations);
    for (int64_t tile = n_tiles * ith / nth; tile < n_tiles * (ith + 1) / nth; ++tile) {
        TileIndices indices;
        for (int64_t c = tile * kTileRows; c < std::min((tile + 1) * kTileRows, n_activations); ++c)
            indices.add(c, 0);
        pack_tile(block_of(dst, 0, n_tiles), tile, packing, indices);
    }
}

void pack_experts_op(ggml_tensor* dst, int ith, int nth, void*) {
    const Packing& packing = packing_of(dst);
    const int64_t n_used = packing.experts->ne[0];
    const ExpertGroups groups(packing.groups, ggml_nelements(packing.experts));
    for (int64_t e = 0; e < packing.n_expert; ++e) {
        const int64_t first_tile = groups.begin_tile[e], n_tiles = groups.begin_tile[e + 1] - first_tile;
        for (int64_t tile = 0; tile < n_tiles; ++tile) {
            if ((first_tile + tile) % nth != ith) continue;
            const int64_t first = groups.begin[e] + tile * kTileRows;
            TileIndices indices;
            for (int64_t c = first; c < std::min<int64_t>(first + kTileRows, groups.begin[e + 1]); ++c)
                indices.add(groups.activations[c] % n_used % packing.x->ne[1],
                            groups.activations[c] / n_used);
            pack_tile(block_of(dst, first_tile, n_tiles), tile, packing, indices);
        }
    }
}

// --- GEMM ---

// One cache block of a GEMM: rows of a weight matrix with some activations of a packed block.
struct Task {
    const ggml_tensor* weight;
    int64_t expert;
    PackedBlock block;
    int64_t first_row, n_rows;  // n_rows: at most n_panels_for() panels
    int64_t first_tile, n_activations;

    int64_t n_panels() const { return (n_rows + kPanelRows - 1) / kPanelRows; }
    int64_t n_tiles() const { return n_tiles_of(n_activations); }
    int64_t panel_elements() const { return 2 * n_tiles() * kAccumulatorElements; }  // of accumulators

    // Panel i, from depth d on.
    Rows panel(int64_t i, int64_t d) const {
        const int64_t row = first_row + i * kPanelRows;
        return {weight->type,   data_of(row),
                weight->nb[1],  std::min(kPanelRows, first_row + n_rows - row),
                d * kTileDepth, block.elements_at(d)};
    }
    // What to prefetch while panel i is multiplied at depth d. With few activations, the next panel's rows
    // are prefetched whole, a slice per depth, in memory order: that is faster than following the depth.
    Prefetch prefetch_after(int64_t i, int64_t d) const {
        if (n_panels() == 1) {
            const int64_t n_splits = (block.depth + kDepth - 1) / kDepth;
            const size_t n_bytes = weight->nb[1] / n_splits;
            return {data_of(first_row + n_rows) + d / kDepth * kPanelRows * n_bytes, n_bytes, n_bytes};
        }
        const bool deeper = i + 1 == n_panels() && d + kDepth < block.depth;
        const bool is_last = i + 1 == n_panels() && !deeper;
        const Rows next = deeper ? panel(0, d + kDepth) : panel(i + 1, is_last ? 0 : d);
        return {next.data + ggml_row_size(next.type, next.first), next.row_bytes,
                ggml_row_size(next.type, next.n)};
    }

  private:
    const char* data_of(int64_t row) const {
        return static_cast<const char*>(weight->data) + expert * weight->nb[2] + row * weight->nb[1];
    }
};

void accumulate(Kernel kernel, const Task& task, Workspace& ws) {
    for (int64_t d = 0; d < task.block.depth; d += kDepth) {
        for (int64_t i = 0; i < task.n_panels(); ++i) {
            const Rows rows = task.panel(i, d);
            unpack(rows, ws.weights, task.prefetch_after(i, d));
            const int64_t depth = depth_of(rows.n);
            const TileOperands operands = {ws.weights, depth * kTileElements,
                                           task.block.at(task.first_tile, d), task.block.activation_stride(d),
                                           ws.accumulators + i * task.panel_elements()};
            tile_gemm(kernel, operands, n_tiles_of(rows.n_rows), task.n_tiles(), depth, d > 0);
        }
    }
}

// `target(i)` is the address of element 0 of activation i's result.
template <typename Target>
void store_tiles(const Task& task, const Workspace& ws, const Target& target) {
    for (int64_t c = 0; c < task.n_activations; c += kTileRows) {
        const int64_t n = std::min(kTileRows, task.n_activations - c);
        for (int64_t r = 0; r < task.n_rows; r += kTileRows) {
            float* targets[kTileRows];
            for (int64_t i = 0; i < n; ++i)
                targets[i] = target(task.first_tile * kTileRows + c + i) + task.first_row + r;
            const float* tile = ws.accumulators + r / kPanelRows * task.panel_elements() +
                                (2 * (c / kTileRows) + r / kTileRows % 2) * kAccumulatorElements;
            store_tile(tile, std::min(kTileRows, task.n_rows - r), targets, n);
        }
    }
}

int64_t n_panels_of(const ggml_tensor* weight) { return (weight->ne[1] + kPanelRows - 1) / kPanelRows; }

// Multiplies some panels of a matrix with all activations of a block.
template <typename Target>
void multiply_panels(Kernel kernel, const ggml_tensor* weight, int64_t expert, const PackedBlock& block,
                     int64_t n_activations, int64_t first_panel, int64_t end_panel, const Target& target) {
    const int64_t end = std::min(end_panel * kPanelRows, weight->ne[1]);
    const int64_t n_at_once = n_panels_for(kernel, block.n_tiles) * kPanelRows;
    for (int64_t row = first_panel * kPanelRows; row < end; row += n_at_once) {
        for (int64_t tile = 0; tile < block.n_tiles; tile += max_tiles(kernel)) {
            const Task task = {weight,
                               expert,
                               block,
                               row,
                               std::min(n_at_once, end - row),
                               tile,
                               std::min(max_tiles(kernel) * kTileRows, n_activations - tile * kTileRows)};
            accumulate(kernel, task, workspace());
            store_tiles(task, workspace(), target);
        }
    }
}

void matmul_op(ggml_tensor* dst, int ith, int nth, void* userdata) {
    const Kernel kernel = kernel_of(userdata);
    const KernelScope scope(kernel);
    const PackedBlock block = block_of(dst->src[1], 0, n_tiles_of(dst->ne[1]));
    // Fewer pieces than asked for, rather than panels by themselves.
    const int64_t n_panels = n_panels_of(dst->src[0]);
    const int64_t n_pieces =
        std::clamp<int64_t>(n_panels / n_panels_for(kernel, block.n_tiles), n_threads_for(nth), nth);
    if (ith >= n_pieces) return;
    multiply_panels(kernel, dst->src[0], 0, block, dst->ne[1], n_panels * ith / n_pieces,
                    n_panels * (ith + 1) / n_pieces, [&](int64_t c) { return activation(dst, c); });
}

void expert_matmul_op(ggml_tensor* dst, int ith, int nth, void* userdata) {
    const ggml_tensor *weight = dst->src[0], *packed = dst->src[1], *experts = packing_of(packed).experts;
    const Kernel kernel = kernel_of(userdata);
    const KernelScope scope(kernel);
    const ExpertGroups groups(packing_of(packed).groups, ggml_nelements(experts));
    const int64_t n_panels = n_panels_of(weight);
    int64_t n_busy = 0;
    for (int64_t e = 0; e < weight->ne[2]; ++e) n_busy += groups.begin[e + 1] > groups.begin[e];
    // Panels of the experts that are used, counted through.
    const int64_t first_panel = n_busy * n_panels * ith / nth,
                  end_panel = n_busy * n_panels * (ith + 1) / nth;
    int64_t panel = 0;  // the expert's first
    for (int64_t e = 0; e < weight->ne[2]; ++e) {
        const int64_t first = groups.begin[e], n_activations = groups.begin[e + 1] - first;
        if (n_activations == 0) continue;
        const int64_t first_tile = groups.begin_tile[e];
        const PackedBlock block = block_of(packed, first_tile, groups.begin_tile[e + 1] - first_tile);
        multiply_panels(kernel, weight, e, block, n_activations, std::max<int64_t>(0, first_panel - panel),
                        std::min(n_panels, end_panel - panel), [&](int64_t c) {
                            const int64_t i = groups.activations[first + c];
                            return activation(dst, i % experts->ne[0], i / experts->ne[0]);
                        });
        panel += n_panels;
    }
}

}  // namespace

MatmulOperands matmul_operands(const ggml_tensor* node) {
    if (node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID)
        return {node->src[0], node->src[1], node->src[2]};
    if (!is_custom_node_of(node, matmul_op) && !is_custom_node_of(node, expert_matmul_op)) return {};
    const Packing& packing = packing_of(node->src[1]);
    return {node->src[0], packing.x, packing.experts};
}

bool Matmul::rounds(const ggml_tensor* weight) const {
    return kernel_ != Kernel::ggml && can_unpack(weight->type, weight->ne[0]);
}

bool Matmul::supports(const ggml_tensor* weight, const ggml_tensor* x) const {
    return x->ne[3] == 1 && weight->ne[3] == 1 && x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) &&
           rounds(weight);
}

bool Matmul::use_tiles(const ggml_tensor* weight, const ggml_tensor* x) const {
    return supports(weight, x) && x->ne[2] == 1 && weight->ne[2] == 1;
}

ggml_tensor* Matmul::grouped(ggml_tensor* experts, int64_t n_expert) {
    ggml_tensor*& groups = groups_[experts];
    if (!groups) {
        groups = ggml_custom_4d(ctx_, GGML_TYPE_I32, ggml_nelements(experts) + 2 * (n_expert + 1), 1, 1, 1,
                                &experts, 1, group_by_expert_op, 1, nullptr);
        ggml_set_name(groups, "group_by_expert");
    }
    return groups;
}

ggml_tensor* Matmul::packed(ggml_tensor* x, ggml_tensor* experts, int64_t n_expert) {
    ggml_tensor*& packed = packed_[x];
    if (packed && packing_of(packed).experts == experts) return packed;
    const ComputeRow compute_row = keep_activations_ ? nullptr : row_function_of(x);
    std::vector<ggml_tensor*> sources;
    if (compute_row) {
        append_sources(sources, x);
    } else {
        sources.push_back(x);
    }
    ggml_tensor* groups = experts ? grouped(experts, n_expert) : nullptr;
    if (groups) sources.push_back(groups);
    const int64_t n_tiles =
        experts ? max_expert_tiles(ggml_nelements(experts), n_expert) : n_tiles_of(x->ne[1]);
    constexpr int64_t alignment_padding = kCacheLine / sizeof(uint16_t);
    packed =
        ggml_custom_4d(ctx_, GGML_TYPE_BF16, depth_of(x->ne[0]) * n_tiles * kTileElements + alignment_padding,
                       1, 1, 1, sources.data(), static_cast<int>(sources.size()),
                       experts ? pack_experts_op : pack_op, GGML_N_TASKS_MAX, nullptr);
    packings_.push_back({x, compute_row, experts, groups, n_expert});
    packed->extra = &packings_.back();
    return ggml_set_name(packed, "pack");
}

namespace {

// With fewer activations than this ggml's CPU backend sums in another order, as tinyBLAS rejects them: fewer
// than 2 on x86-64, up to 8 elsewhere (ggml-cpu/llamafile). ARM's dot products of two activations still
// depend on whether n is even.
constexpr int64_t kMinActivations = 8;

// Requests float32 sums from ggml's matmuls: GPUs may sum in float16 otherwise. Not for bfloat16, which is
// summed in float32 anyway, and whose weights would be converted to float32 first.
ggml_tensor* with_exact_sums(ggml_tensor* result) {
    if (result->src[0]->type != GGML_TYPE_BF16) ggml_prec_set_acc(result, GGML_PREC_F32);
    return result;
}

}  // namespace

ggml_tensor* ggml_matmul(ggml_context* ctx, ggml_tensor* weight, ggml_tensor* x) {
    return with_exact_sums(ggml_mul_mat(ctx, weight, x));
}

ggml_tensor* ggml_matmul(ggml_context* ctx, ggml_tensor* weight, ggml_tensor* x, ggml_tensor* experts) {
    return with_exact_sums(ggml_mul_mat_id(ctx, weight, x, experts));
}

ggml_tensor* Matmul::apply(ggml_tensor* weight, ggml_tensor* x) {
    const int64_t n = x->ne[1];
    if (n >= kMinActivations || use_tiles(weight, x) || keep_activations_) return apply_unpadded(weight, x);
    ggml_tensor* padded = ggml_pad(ctx_, x, 0, static_cast<int>(kMinActivations - n), 0, 0);
    ggml_tensor* result = apply_unpadded(weight, padded);
    return ggml_view_2d(ctx_, result, result->ne[0], n, result->nb[1], 0);
}

ggml_tensor* Matmul::apply_unpadded(ggml_tensor* weight, ggml_tensor* x) {
    if (!use_tiles(weight, x)) return ggml_matmul(ctx_, weight, x);
    ggml_tensor* sources[] = {weight, packed(x, nullptr, 0)};
    ggml_tensor* result =
        ggml_custom_4d(ctx_, GGML_TYPE_F32, weight->ne[1], x->ne[1], 1, 1, sources, 2, matmul_op,
                       GGML_N_TASKS_MAX, reinterpret_cast<void*>(static_cast<intptr_t>(kernel_)));
    return ggml_set_name(result, "matmul");
}

ggml_tensor* Matmul::apply(ggml_tensor* weight, ggml_tensor* x, ggml_tensor* experts) {
    if (!supports(weight, x)) return ggml_matmul(ctx_, weight, x, experts);
    ggml_tensor* sources[] = {weight, packed(x, experts, weight->ne[2]), grouped(experts, weight->ne[2])};
    ggml_tensor* result = ggml_custom_4d(ctx_, GGML_TYPE_F32, weight->ne[1], experts->ne[0], experts->ne[1],
                                         1, sources, 3, expert_matmul_op, GGML_N_TASKS_MAX,
                                         reinterpret_cast<void*>(static_cast<intptr_t>(kernel_)));
    return ggml_set_name(result, "expert_matmul");
}

}  // namespace gemm
}  // namespace pydiffusion
