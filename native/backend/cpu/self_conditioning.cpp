#include "backend/cpu/self_conditioning.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "backend/cpu/amx/weighted_sums.h"
#include "backend/cpu/custom_node.h"
#include "backend/cpu/simd_gemm.h"
#include "util/simd_math.h"

#if defined(_MSC_VER)
#include <intrin.h>
#elif defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace pydiffusion {

namespace {

constexpr int64_t kTile = 64;  // vocabulary rows per mask
// Embedding dims of a task at most, and without tiles: multiples of every quantization block.
constexpr int64_t kSlice = 512, kSliceWithoutTiles = 256;
constexpr int64_t kBlock = gemm::kSoftRows;  // vocabulary rows that are either gathered or multiplied densely
static_assert(kSlice == gemm::kSoftDims && kBlock % kTile == 0);

// Of a block: nonzero probabilities, and rows that have any.
struct Mass {
    int64_t n_probabilities = 0, n_rows = 0;
};

// Whether a dense GEMM of a block of n_rows with n_tokens is faster than gathering.
//
// In float32, gathering all probabilities takes about 1.5 times as long as the GEMM (measured at d 1024, 256
// tokens), and converting a row is cheap in comparison. With tiles the GEMM is so fast that converting a row
// to floats, which ggml does without vectors, costs as much as multiplying it with all tokens: the constants
// are nanoseconds per element of a row, measured at the same shape.
bool is_dense(const Mass& mass, int64_t n_rows, int64_t n_tokens, bool use_tiles) {
    if (!use_tiles) return 3 * mass.n_probabilities > 2 * n_rows * n_tokens;
    const double gathered =
        1.0 * static_cast<double>(mass.n_rows) + 0.05 * static_cast<double>(mass.n_probabilities);
    const double dense = static_cast<double>(n_rows) * (0.1 + 0.0035 * static_cast<double>(n_tokens));
    return gathered > dense;
}

int lowest_bit(uint64_t bits) {
#if defined(_MSC_VER)
    unsigned long index;
    _BitScanForward64(&index, bits);
    return static_cast<int>(index);
#else
    return __builtin_ctzll(bits);
#endif
}

int count_bits(uint64_t bits) {
#if defined(_MSC_VER)
    return static_cast<int>(__popcnt64(bits));
#else
    return __builtin_popcountll(bits);
#endif
}

float* row(const ggml_tensor* t, int64_t i) {
    return reinterpret_cast<float*>(static_cast<char*>(t->data) + i * t->nb[1]);
}

// --- probabilities ---

// Whether the probabilities below a threshold sum to at most `bound`.
bool tail_is_at_most(const float* p, int64_t n, float threshold, float bound) {
    constexpr int64_t kShort = 4096, kSums = 64;  // float32 sums of kShort, then float64
    double below = 0.0;
    for (int64_t begin = 0; begin < n && below <= bound; begin += kShort) {
        const int64_t end = std::min(begin + kShort, n);
        float sums[kSums] = {};
        int64_t i = begin;
        for (; i + kSums <= end; i += kSums) {
            for (int j = 0; j < kSums; ++j) sums[j] += p[i + j] < threshold ? p[i + j] : 0.0f;
        }
        for (; i < end; ++i) sums[0] += p[i] < threshold ? p[i] : 0.0f;
        for (const float sum : sums) below += sum;
    }
    return below <= bound;
}

// The largest candidate below which the probabilities sum to at most `bound`. Few passes are complete: flat
// distributions exceed the bound early, and peaked ones pass with the first candidate.
float find_threshold(const float* p, int64_t n, float bound) {
    for (const float candidate : {1e-4f, 1e-5f, 1e-6f, 1e-7f, 1e-8f, 1e-9f, 1e-10f}) {
        if (tail_is_at_most(p, n, candidate, bound)) return candidate;
    }
    return 0.0f;
}

// Bit r is whether tile[r] != 0, for kTile probabilities.
uint64_t nonzero_bits(const float* tile) {
    uint64_t bits = 0;
#if defined(__AVX512F__) && !defined(_MSC_VER)
    for (int64_t r = 0; r < kTile; r += 16) {
        const uint64_t nonzero =
            _mm512_cmp_ps_mask(_mm512_loadu_ps(tile + r), _mm512_setzero_ps(), _CMP_NEQ_UQ);
        bits |= nonzero << r;
    }
#else
    for (int64_t r = 0; r < kTile; ++r) bits |= uint64_t{tile[r] != 0.0f} << r;
#endif
    return bits;
}

// Zeroes probabilities below the threshold and writes a mask of the nonzero ones per tile.
void write_masks(float* p, int64_t n, float threshold, uint64_t* mass, int64_t stride) {
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t n_rows = std::min(kTile, n - begin);
        float* tile = p + begin;
        for (int64_t r = 0; r < n_rows; ++r) tile[r] = tile[r] < threshold ? 0.0f : tile[r];
        uint64_t& bits = mass[begin / kTile * stride];
        if (n_rows == kTile) {
            bits = nonzero_bits(tile);
        } else {
            float last[kTile] = {};
            std::copy_n(tile, n_rows, last);
            bits = nonzero_bits(last);
        }
    }
}

void soft_probabilities_op(ggml_tensor* dst, int ith, int nth, void* userdata) {
    auto* state = static_cast<StepState*>(userdata);
    if (!state->self_conditioning) return;
    const int64_t n_vocab = dst->ne[0], n_tokens = dst->ne[1];
    // Contiguous ranges of tokens: neighbours' masks share cache lines.
    for (int64_t t = n_tokens * ith / nth; t < n_tokens * (ith + 1) / nth; ++t) {
        float* p = row(dst, t);
        softmax_row(p, n_vocab, state->previous_temperature, state->normalizers[t]);
        const float threshold =
            state->dropped_mass > 0.0f ? find_threshold(p, n_vocab, state->dropped_mass) : 0.0f;
        write_masks(p, n_vocab, threshold, state->mass.data() + t, dst->ne[1]);
    }
}

// --- the mean of embeddings ---

// The part of the result that a task computes: a range of embedding dims and of tokens.
struct OutputRange {
    int64_t dim, n_dims, token, n_tokens;
    int64_t n_lanes() const { return (n_tokens + simd::kLanes - 1) / simd::kLanes * simd::kLanes; }
};

struct SoftEmbedding {
    const ggml_tensor* dst;
    const ggml_tensor* probabilities;
    const ggml_tensor* embedding;
    const StepState& state;

    bool use_tiles() const {
        return state.kernel == gemm::Kernel::amx && gemm::can_unpack(embedding->type, embedding->ne[0]);
    }
};

// Per-thread buffers.
struct Workspace {
    explicit Workspace(int64_t n_tokens, bool use_tiles)
        : lanes((n_tokens + simd::kLanes - 1) / simd::kLanes * simd::kLanes) {
        tile.resize(kTile * kSlice);
        if (use_tiles) {
            soft_sums.emplace(n_tokens);
            return;
        }
        weights.resize(kTile * lanes);
        sums.resize(kSlice * lanes);
    }
    int64_t lanes;
    std::vector<float> tile;                      // [row][dim] of the embedding
    std::vector<float> weights;                   // [row][token]
    std::vector<float> sums;                      // [dim][token], of the dense blocks
    std::optional<gemm::WeightedSums> soft_sums;  // in place of weights and sums
};

// Converts the range's dims of the rows in `mask`, counted from row `first`, to floats.
void load_rows(float* tile, const ggml_tensor* embedding, int64_t first, uint64_t mask,
               const OutputRange& range) {
    const ggml_to_float_t to_float = ggml_get_type_traits(embedding->type)->to_float;
    const size_t offset = ggml_row_size(embedding->type, range.dim);
    for (uint64_t remaining = mask; remaining; remaining &= remaining - 1) {
        const int r = lowest_bit(remaining);
        const char* source =
            static_cast<const char*>(embedding->data) + (first + r) * embedding->nb[1] + offset;
        if (to_float) {
            to_float(source, tile + r * kSlice, range.n_dims);
        } else {
            std::memcpy(tile + r * kSlice, source, range.n_dims * sizeof(float));
        }
    }
}

// Rounds to bfloat16, as the dense GEMM does, so that the choice between the two hardly changes the result.
void round_rows(float* tile, uint64_t mask, int64_t n) {
    for (uint64_t remaining = mask; remaining; remaining &= remaining - 1) {
        float* row = tile + lowest_bit(remaining) * kSlice;
        for (int64_t i = 0; i < n; ++i) row[i] = nearest_bfloat16(row[i]);
    }
}

// accumulator[0..n) += sum over the rows r in `mask` of p[r] * tile[r][0..n).
void add_rows(float* accumulator, const float* p, const float* tile, uint64_t mask, int64_t n) {
    constexpr int64_t width = 64;
    int64_t c = 0;
    for (; c + width <= n; c += width) {
        float sums[width];
        std::memcpy(sums, accumulator + c, sizeof sums);
        for (uint64_t remaining = mask; remaining; remaining &= remaining - 1) {
            const int r = lowest_bit(remaining);
            const float weight = p[r];
            const float* row_values = tile + r * kSlice + c;
            for (int64_t i = 0; i < width; ++i) sums[i] += weight * row_values[i];
        }
        std::memcpy(accumulator + c, sums, sizeof sums);
    }
    if (c == n) return;
    for (uint64_t remaining = mask; remaining; remaining &= remaining - 1) {
        const int r = lowest_bit(remaining);
        for (int64_t i = c; i < n; ++i) accumulator[i] += p[r] * tile[r * kSlice + i];
    }
}

void gather_tile(const SoftEmbedding& op, const OutputRange& range, const Workspace& ws, int64_t first,
                 const uint64_t* mass) {
    for (int64_t t = range.token; t < range.token + range.n_tokens; ++t) {
        if (!mass[t]) continue;
        add_rows(row(op.dst, t) + range.dim, row(op.probabilities, t) + first, ws.tile.data(), mass[t],
                 range.n_dims);
    }
}

void multiply_tile(const SoftEmbedding& op, const OutputRange& range, Workspace& ws, int64_t first,
                   int64_t n_rows) {
    const int64_t n_lanes = range.n_lanes();
    load_rows(ws.tile.data(), op.embedding, first, ~uint64_t{0} >> (kTile - n_rows), range);
    for (int64_t t = 0; t < n_lanes; ++t) {
        const float* p = row(op.probabilities, range.token + std::min(t, range.n_tokens - 1)) + first;
        for (int64_t r = 0; r < n_rows; ++r) ws.weights[r * n_lanes + t] = p[r];
    }
    simd::multiply_add({ws.tile.data(), 1, kSlice}, ws.weights.data(), ws.sums.data(), range.n_dims, n_rows,
                       n_lanes);
}

void multiply_block(const SoftEmbedding& op, const OutputRange& range, Workspace& ws, int64_t first,
                    int64_t n_rows) {
    if (!ws.soft_sums) {
        for (int64_t r = 0; r < n_rows; r += kTile)
            multiply_tile(op, range, ws, first + r, std::min(kTile, n_rows - r));
        return;
    }
    std::vector<const float*> p(range.n_tokens);
    for (int64_t t = 0; t < range.n_tokens; ++t) p[t] = row(op.probabilities, range.token + t) + first;
    const ggml_tensor* e = op.embedding;
    const char* data = static_cast<const char*>(e->data) + first * e->nb[1];
    ws.soft_sums->add(p.data(), range.n_tokens, {e->type, data, e->nb[1], n_rows, range.dim, range.n_dims});
}

void clear_sums(const SoftEmbedding& op, const OutputRange& range, Workspace& ws) {
    for (int64_t t = range.token; t < range.token + range.n_tokens; ++t)
        std::fill_n(row(op.dst, t) + range.dim, range.n_dims, 0.0f);
    if (ws.soft_sums) {
        ws.soft_sums->clear();
    } else {
        std::fill_n(ws.sums.data(), range.n_dims * range.n_lanes(), 0.0f);
    }
}

// Adds the dense blocks' sums to the gathered ones, and scales the total.
void add_sums(const SoftEmbedding& op, const OutputRange& range, const Workspace& ws) {
    const int64_t n_lanes = range.n_lanes();
    for (int64_t t = 0; t < range.n_tokens; ++t) {
        float* out = row(op.dst, range.token + t) + range.dim;
        if (ws.soft_sums) {
            ws.soft_sums->add_to(out, t, range.n_dims);
        } else {
            for (int64_t i = 0; i < range.n_dims; ++i) out[i] += ws.sums[i * n_lanes + t];
        }
        for (int64_t i = 0; i < range.n_dims; ++i) out[i] *= op.state.embedding_scale;
    }
}

// masks [n_tiles][n_tokens]
Mass mass_of(const uint64_t* masks, int64_t n_tiles, int64_t n_tokens) {
    Mass mass;
    for (int64_t i = 0; i < n_tiles; ++i, masks += n_tokens) {
        uint64_t row_mask = 0;
        for (int64_t t = 0; t < n_tokens; ++t) {
            row_mask |= masks[t];
            mass.n_probabilities += count_bits(masks[t]);
        }
        mass.n_rows += count_bits(row_mask);
    }
    return mass;
}

void compute_range(const SoftEmbedding& op, const OutputRange& range, Workspace& ws) {
    const int64_t n_vocab = op.embedding->ne[1], end = range.token + range.n_tokens;
    const int64_t n_all_tokens = op.dst->ne[1];  // tokens of all ranges
    clear_sums(op, range, ws);
    if (!op.state.self_conditioning) return;

    for (int64_t first = 0; first < n_vocab; first += kBlock) {
        const int64_t n_rows = std::min(kBlock, n_vocab - first);
        const uint64_t* mass = op.state.mass.data() + first / kTile * n_all_tokens;
        const int64_t n_tiles = (n_rows + kTile - 1) / kTile;
        // Decided over all tokens, so that the result does not depend on how threads split them.
        if (is_dense(mass_of(mass, n_tiles, n_all_tokens), n_rows, n_all_tokens, ws.soft_sums.has_value())) {
            multiply_block(op, range, ws, first, n_rows);
            continue;
        }
        for (int64_t i = 0; i < n_tiles; ++i) {
            uint64_t needed = 0;
            for (int64_t t = range.token; t < end; ++t) needed |= mass[i * n_all_tokens + t];
            if (!needed) continue;
            load_rows(ws.tile.data(), op.embedding, first + i * kTile, needed, range);
            if (ws.soft_sums) round_rows(ws.tile.data(), needed, range.n_dims);
            gather_tile(op, range, ws, first + i * kTile, mass + i * n_all_tokens);
        }
    }
    add_sums(op, range, ws);
}

// Each element of the result is computed by one task, in a fixed order.
void soft_embedding_op(ggml_tensor* dst, int ith, int nth, void* userdata) {
    const SoftEmbedding op = {dst, dst->src[0], dst->src[1], *static_cast<const StepState*>(userdata)};
    const int64_t d = dst->ne[0], n_tokens = dst->ne[1];
    const int64_t slice = op.use_tiles() ? kSlice : kSliceWithoutTiles, n_slices = (d + slice - 1) / slice;
    // Enough groups of tokens to keep all threads busy, although each group reads the embedding anew.
    const int64_t n_groups = std::min(n_tokens, (2 * n_threads_for(nth) + n_slices - 1) / n_slices);
    if (ith >= n_slices * n_groups) return;
    Workspace ws((n_tokens + n_groups - 1) / n_groups, op.use_tiles());
    const gemm::KernelScope scope(ws.soft_sums ? op.state.kernel : gemm::Kernel::ggml);
    for (int64_t task = ith; task < n_slices * n_groups; task += nth) {
        const int64_t dim = task % n_slices * slice, group = task / n_slices;
        const int64_t token = group * n_tokens / n_groups, next = (group + 1) * n_tokens / n_groups;
        compute_range(op, {dim, std::min(slice, d - dim), token, next - token}, ws);
    }
}

}  // namespace

ggml_tensor* soft_probabilities(ggml_context* ctx, ggml_tensor* logits, StepState* state) {
    state->mass.assign((logits->ne[0] + kTile - 1) / kTile * logits->ne[1], 0);
    ggml_tensor* probabilities =
        ggml_custom_inplace(ctx, logits, nullptr, 0, soft_probabilities_op, GGML_N_TASKS_MAX, state);
    return ggml_set_name(probabilities, "soft_probabilities");
}

ggml_tensor* soft_embedding(ggml_context* ctx, ggml_tensor* probabilities, ggml_tensor* embedding,
                            StepState* state) {
    ggml_tensor* sources[] = {probabilities, embedding};
    ggml_tensor* soft = ggml_custom_4d(ctx, GGML_TYPE_F32, embedding->ne[0], probabilities->ne[1], 1, 1,
                                       sources, 2, soft_embedding_op, GGML_N_TASKS_MAX, state);
    return ggml_set_name(soft, "soft_embedding");
}

bool is_soft_embedding(const ggml_tensor* node) { return is_custom_node_of(node, soft_embedding_op); }

}  // namespace pydiffusion
