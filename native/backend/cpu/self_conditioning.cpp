#include "backend/cpu/self_conditioning.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "backend/cpu/amx/weighted_sums.h"
#include "backend/cpu/simd_gemm.h"
#include "util/simd_math.h"

#if defined(_MSC_VER)
#include <intrin.h>
#elif defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace pydiffusion {

namespace {

constexpr int64_t kTile = 64;  // rows of the vocabulary at a time; bits of a mask
constexpr int64_t kSlice =
    512;  // columns of the embedding that one task owns: a multiple of every block size
constexpr int64_t kBlock = gemm::kSoftRows;  // rows that are gathered, or all multiplied
static_assert(kSlice == gemm::kSoftDims && kBlock % kTile == 0);

// Of a block: probabilities that have mass, and rows that have any.
struct Mass {
    int64_t n_probabilities = 0, n_rows = 0;
};

// Whether to multiply a block of n_rows with n_tokens densely rather than to gather what has mass.
//
// With floats, gathering everything takes about one and a half times as long (measured at d 1024, 256
// tokens), and a row costs little beside what is done with it. With tiles the dense product is so fast that a
// row made of floats, which ggml does weight by weight, costs as much as its product with all tokens: the
// figures are nanoseconds for each number of a row, measured at the same shape.
bool is_dense(const Mass& mass, int64_t n_rows, int64_t n_tokens, bool by_tiles) {
    if (!by_tiles) return 3 * mass.n_probabilities > 2 * n_rows * n_tokens;
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

// Whether the probabilities below a threshold together weigh at most `bound`.
bool weighs_at_most(const float* p, int64_t n, float threshold, float bound) {
    constexpr int64_t kShort = 4096, kSums = 64;  // short sums in float32, long ones in float64
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

// The largest of some thresholds below which the probabilities together weigh at most `bound`. Flat
// distributions soon weigh more than that below the large ones, peaked ones don't below the first.
float find_threshold(const float* p, int64_t n, float bound) {
    for (const float candidate : {1e-4f, 1e-5f, 1e-6f, 1e-7f, 1e-8f, 1e-9f, 1e-10f}) {
        if (weighs_at_most(p, n, candidate, bound)) return candidate;
    }
    return 0.0f;
}

// Bit r tells whether tile[r] is not 0, for kTile probabilities.
uint64_t nonzero_bits(const float* tile) {
    uint64_t bits = 0;
#if defined(__AVX512F__) && !defined(_MSC_VER)
    for (int64_t r = 0; r < kTile; r += 16) {
        const uint64_t some = _mm512_cmp_ps_mask(_mm512_loadu_ps(tile + r), _mm512_setzero_ps(), _CMP_NEQ_UQ);
        bits |= some << r;
    }
#else
    for (int64_t r = 0; r < kTile; ++r) bits |= uint64_t{tile[r] != 0.0f} << r;
#endif
    return bits;
}

// Clears what is below the threshold and notes what is left, tile by tile.
void note_mass(float* p, int64_t n, float threshold, uint64_t* mass, int64_t stride) {
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
    // Ranges of tokens: the masks of neighbours lie in the same lines of the cache.
    for (int64_t t = n_tokens * ith / nth; t < n_tokens * (ith + 1) / nth; ++t) {
        float* p = row(dst, t);
        softmax_row(p, n_vocab, state->previous_temperature, state->normalizers[t]);
        const float threshold =
            state->dropped_mass > 0.0f ? find_threshold(p, n_vocab, state->dropped_mass) : 0.0f;
        note_mass(p, n_vocab, threshold, state->mass.data() + t, dst->ne[1]);
    }
}

// --- the mean of embeddings ---

// A task's share of the product: some columns of the embedding for some tokens.
struct Share {
    int64_t column, n_columns, token, n_tokens;
    int64_t n_lanes() const { return (n_tokens + simd::kLanes - 1) / simd::kLanes * simd::kLanes; }
};

struct Product {
    const ggml_tensor* dst;
    const ggml_tensor* probabilities;
    const ggml_tensor* embedding;
    const StepState& state;

    bool by_tiles() const {
        return state.kernel == gemm::Kernel::amx && gemm::can_unpack(embedding->type, embedding->ne[0]);
    }
};

// What a thread works in.
struct Area {
    explicit Area(int64_t n_tokens, bool by_tiles)
        : lanes((n_tokens + simd::kLanes - 1) / simd::kLanes * simd::kLanes) {
        tile.resize(kTile * kSlice);
        if (by_tiles) {
            soft_sums.emplace(n_tokens);
            return;
        }
        weights.resize(kTile * lanes);
        sums.resize(kSlice * lanes);
    }
    int64_t lanes;
    std::vector<float> tile;                      // [row][column] of the embedding
    std::vector<float> weights;                   // [row][token]
    std::vector<float> sums;                      // [column][token], of the dense blocks
    std::optional<gemm::WeightedSums> soft_sums;  // instead of weights and sums
};

// Turns the rows in `mask`, from `first` on, into floats in the columns of the share.
void load_rows(float* tile, const ggml_tensor* embedding, int64_t first, uint64_t mask, const Share& share) {
    const ggml_to_float_t to_float = ggml_get_type_traits(embedding->type)->to_float;
    const size_t offset = ggml_row_size(embedding->type, share.column);
    for (uint64_t left = mask; left; left &= left - 1) {
        const int r = lowest_bit(left);
        const char* source =
            static_cast<const char*>(embedding->data) + (first + r) * embedding->nb[1] + offset;
        if (to_float) {
            to_float(source, tile + r * kSlice, share.n_columns);
        } else {
            std::memcpy(tile + r * kSlice, source, share.n_columns * sizeof(float));
        }
    }
}

// To the nearest bfloat16, halves to even, as the dense product has them: then it matters little which of the
// two a row is taken with.
void round_rows(float* tile, uint64_t mask, int64_t n) {
    for (uint64_t left = mask; left; left &= left - 1) {
        float* row = tile + lowest_bit(left) * kSlice;
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
        for (uint64_t left = mask; left; left &= left - 1) {
            const int r = lowest_bit(left);
            const float weight = p[r];
            const float* values = tile + r * kSlice + c;
            for (int64_t i = 0; i < width; ++i) sums[i] += weight * values[i];
        }
        std::memcpy(accumulator + c, sums, sizeof sums);
    }
    if (c == n) return;
    for (uint64_t left = mask; left; left &= left - 1) {
        const int r = lowest_bit(left);
        for (int64_t i = c; i < n; ++i) accumulator[i] += p[r] * tile[r * kSlice + i];
    }
}

void gather_tile(const Product& product, const Share& share, const Area& area, int64_t first,
                 const uint64_t* mass) {
    for (int64_t t = share.token; t < share.token + share.n_tokens; ++t) {
        if (!mass[t]) continue;
        add_rows(row(product.dst, t) + share.column, row(product.probabilities, t) + first, area.tile.data(),
                 mass[t], share.n_columns);
    }
}

void multiply_tile(const Product& product, const Share& share, Area& area, int64_t first, int64_t n_rows) {
    const int64_t n_lanes = share.n_lanes();
    load_rows(area.tile.data(), product.embedding, first, ~uint64_t{0} >> (kTile - n_rows), share);
    for (int64_t t = 0; t < n_lanes; ++t) {
        const float* p = row(product.probabilities, share.token + std::min(t, share.n_tokens - 1)) + first;
        for (int64_t r = 0; r < n_rows; ++r) area.weights[r * n_lanes + t] = p[r];
    }
    simd::multiply_add({area.tile.data(), 1, kSlice}, area.weights.data(), area.sums.data(), share.n_columns,
                       n_rows, n_lanes);
}

void multiply_block(const Product& product, const Share& share, Area& area, int64_t first, int64_t n_rows) {
    if (!area.soft_sums) {
        for (int64_t r = 0; r < n_rows; r += kTile)
            multiply_tile(product, share, area, first + r, std::min(kTile, n_rows - r));
        return;
    }
    std::vector<const float*> p(share.n_tokens);
    for (int64_t t = 0; t < share.n_tokens; ++t) p[t] = row(product.probabilities, share.token + t) + first;
    const ggml_tensor* e = product.embedding;
    const char* data = static_cast<const char*>(e->data) + first * e->nb[1];
    area.soft_sums->add(p.data(), share.n_tokens,
                        {e->type, data, e->nb[1], n_rows, share.column, share.n_columns});
}

void clear_sums(const Product& product, const Share& share, Area& area) {
    for (int64_t t = share.token; t < share.token + share.n_tokens; ++t)
        std::fill_n(row(product.dst, t) + share.column, share.n_columns, 0.0f);
    if (area.soft_sums) {
        area.soft_sums->clear();
    } else {
        std::fill_n(area.sums.data(), share.n_columns * share.n_lanes(), 0.0f);
    }
}

// The dense blocks' sums to the gathered ones, and all of it scaled.
void add_sums(const Product& product, const Share& share, const Area& area) {
    const int64_t n_lanes = share.n_lanes();
    for (int64_t t = 0; t < share.n_tokens; ++t) {
        float* out = row(product.dst, share.token + t) + share.column;
        if (area.soft_sums) {
            area.soft_sums->add_to(out, t, share.n_columns);
        } else {
            for (int64_t i = 0; i < share.n_columns; ++i) out[i] += area.sums[i * n_lanes + t];
        }
        for (int64_t i = 0; i < share.n_columns; ++i) out[i] *= product.state.embedding_scale;
    }
}

// masks [n_tiles][n_tokens]
Mass mass_of(const uint64_t* masks, int64_t n_tiles, int64_t n_tokens) {
    Mass mass;
    for (int64_t i = 0; i < n_tiles; ++i, masks += n_tokens) {
        uint64_t any = 0;
        for (int64_t t = 0; t < n_tokens; ++t) {
            any |= masks[t];
            mass.n_probabilities += count_bits(masks[t]);
        }
        mass.n_rows += count_bits(any);
    }
    return mass;
}

void soft_embedding_share(const Product& product, const Share& share, Area& area) {
    const int64_t n_vocab = product.embedding->ne[1], end = share.token + share.n_tokens;
    const int64_t n_all = product.dst->ne[1];  // tokens of all shares
    clear_sums(product, share, area);
    if (!product.state.self_conditioning) return;

    for (int64_t first = 0; first < n_vocab; first += kBlock) {
        const int64_t n_rows = std::min(kBlock, n_vocab - first);
        const uint64_t* mass = product.state.mass.data() + first / kTile * n_all;
        const int64_t n_tiles = (n_rows + kTile - 1) / kTile;
        // All tokens decide, so that it doesn't matter how they are shared out among threads.
        if (is_dense(mass_of(mass, n_tiles, n_all), n_rows, n_all, area.soft_sums.has_value())) {
            multiply_block(product, share, area, first, n_rows);
            continue;
        }
        for (int64_t i = 0; i < n_tiles; ++i) {
            uint64_t needed = 0;
            for (int64_t t = share.token; t < end; ++t) needed |= mass[i * n_all + t];
            if (!needed) continue;
            load_rows(area.tile.data(), product.embedding, first + i * kTile, needed, share);
            if (area.soft_sums) round_rows(area.tile.data(), needed, share.n_columns);
            gather_tile(product, share, area, first + i * kTile, mass + i * n_all);
        }
    }
    add_sums(product, share, area);
}

// Each number of the product is made by one task in one order.
void soft_embedding_op(ggml_tensor* dst, int ith, int nth, void* userdata) {
    const Product product = {dst, dst->src[0], dst->src[1], *static_cast<const StepState*>(userdata)};
    const int64_t d = dst->ne[0], n_tokens = dst->ne[1], n_slices = (d + kSlice - 1) / kSlice;
    // Enough groups of tokens to keep all threads busy, though each group reads the embedding again.
    const int64_t n_groups = std::min(n_tokens, (2 * nth + n_slices - 1) / n_slices);
    Area area((n_tokens + n_groups - 1) / n_groups, product.by_tiles());
    const gemm::KernelScope ready(area.soft_sums ? product.state.kernel : gemm::Kernel::ggml);
    for (int64_t task = ith; task < n_slices * n_groups; task += nth) {
        const int64_t column = task % n_slices * kSlice, group = task / n_slices;
        const int64_t token = group * n_tokens / n_groups, next = (group + 1) * n_tokens / n_groups;
        soft_embedding_share(product, {column, std::min(kSlice, d - column), token, next - token}, area);
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

}  // namespace pydiffusion
