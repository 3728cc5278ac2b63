// Flash attention on Hopper: softmax(q . k) v over rows of a float16 cache, by warpgroup matmuls. A block has
// two warpgroups that compute and one of which a thread copies. It computes 128 rows (a token and one of the query heads
// of a KV head) of 256 dimensions, 64 a warpgroup, or 64 rows of 512 dimensions, of which each warpgroup has
// half and adds the other's half of the scores. Keys may be split among blocks; merge_attention() then adds
// their results.
#pragma once

#include "backend/cuda/hopper_tiles.cuh"
#include "backend/cuda/row_fours.cuh"

namespace pydiffusion::cuda {

constexpr int kAttentionDims = 256;                            // of a warpgroup
constexpr int kAttentionRows = 64;                             // of a warpgroup
constexpr int kWarpgroupThreads = 128, kAttentionWarps = 8;
constexpr int kAttentionThreads = 3 * kWarpgroupThreads;  // the last warpgroup copies
// Registers of a thread that copies, computes; their sum must not exceed what the block is launched with.
constexpr int kCopyingRegisters = 24, kComputingRegisters = 240;

// Dimensions of a head, keys of a tile, stages of tiles in shared memory.
template <int kDims_, int kKeys_, int kStages_>
struct AttentionTile {
    static constexpr int kDims = kDims_, kKeys = kKeys_, kStages = kStages_;
    static constexpr bool kSharesRows = kDims == 2 * kAttentionDims;  // both warpgroups have the same rows
    static constexpr int kRows = kSharesRows ? kAttentionRows : 2 * kAttentionRows;
    static constexpr int kParts = kKeys / 8, kSteps = kKeys / 16;
    static constexpr int kChunks = kDims / 64, kAtomBytes = kKeys * 128, kTileBytes = kChunks * kAtomBytes;
    static constexpr int kQueryBytes = kAttentionRows * kAttentionDims * 2;  // of a warpgroup
    static constexpr int kScoreBytes = kSharesRows ? kAttentionRows * kKeys * 4 : 0;
    static constexpr int kValuesAt = 2 * kQueryBytes + kStages * kTileBytes;
    static constexpr int kScoresAt = kValuesAt + kStages * kTileBytes;
    static constexpr int kBarriersAt = kScoresAt + 2 * kScoreBytes;
    static constexpr int kBarriers = 4 * kStages + 4;
    static constexpr int kSharedBytes = kBarriersAt + kBarriers * 8;
    static_assert(kDims == kAttentionDims || kSharesRows);
    static_assert(kSharedBytes <= 227 * 1024);
};

struct AttentionArguments {
    TensorMap k, v;  // chunks of 64 dimensions of all KV heads, rows that are visible to any token
    const void* q;   // [kDims, n_heads, n_tokens], float32 or, if q_is_half, float16
    int64_t q_head, q_token;  // distances in elements
    int32_t q_is_half;
    int32_t n_tokens, group;           // group: query heads of a KV head
    int32_t n_rows;                    // visible ones
    int32_t own_row, window;           // of token 0, causal attention; window 0: every token sees all rows
    int32_t n_splits;
    void* out;  // [kDims * n_heads, n_tokens] of `type`
    int64_t out_token;
    FloatType type;
    // Of more than one split: per split, row tile and warpgroup results as float16, in the order of registers,
    // and per row its maximum and sum.
    uint4* partial;
    float2* sums;
};

// Rows that a range of tokens sees: those that any of them does, and those that all do.
struct VisibleRows {
    int32_t first, end, all_first, all_end;
};

__device__ __forceinline__ int32_t first_visible(const AttentionArguments& a, int32_t token) {
    return a.window ? max(0, a.own_row + token - a.window + 1) : 0;
}
__device__ __forceinline__ int32_t end_visible(const AttentionArguments& a, int32_t token) {
    return a.window ? min(a.n_rows, a.own_row + token + 1) : a.n_rows;
}

// A block's tile of rows; of causal attention those with most keys are the first to begin.
__device__ __forceinline__ int32_t row_tile() { return static_cast<int32_t>(gridDim.x - 1 - blockIdx.x); }

// Tiles [begin, end) of keys that a block is to compute.
struct KeyTiles {
    int32_t begin, end;
    int32_t all_first, all_end;  // rows that are visible to all of its rows
};

template <typename T>
__device__ __forceinline__ KeyTiles key_tiles(const AttentionArguments& a) {
    const int32_t n = a.n_tokens * a.group;
    const int32_t row = row_tile() * T::kRows;
    const int32_t first_token = row / a.group;
    const int32_t last = (min(row + T::kRows, n) - 1) / a.group;
    const int32_t begin = first_visible(a, first_token) / T::kKeys;
    const int32_t end = (end_visible(a, last) + T::kKeys - 1) / T::kKeys;
    const int32_t n_tiles = max(end - begin, 0), split = static_cast<int32_t>(blockIdx.y);
    return {begin + static_cast<int32_t>(int64_t{n_tiles} * split / a.n_splits),
            begin + static_cast<int32_t>(int64_t{n_tiles} * (split + 1) / a.n_splits), first_visible(a, last),
            end_visible(a, first_token)};
}

// The barriers of a block: a stage of K or V has arrived, all warps have read it; scores are written, read; a
// warpgroup has written its rows of q.
template <typename T>
struct AttentionBarriers {
    uint64_t* all;
    __device__ __forceinline__ uint64_t* k_arrived(int stage) const { return all + stage; }
    __device__ __forceinline__ uint64_t* v_arrived(int stage) const { return all + T::kStages + stage; }
    __device__ __forceinline__ uint64_t* k_read(int stage) const { return all + 2 * T::kStages + stage; }
    __device__ __forceinline__ uint64_t* v_read(int stage) const { return all + 3 * T::kStages + stage; }
    __device__ __forceinline__ uint64_t* scores_written() const { return all + 4 * T::kStages; }
    __device__ __forceinline__ uint64_t* scores_read() const { return all + 4 * T::kStages + 1; }

    __device__ __forceinline__ uint64_t* queries_written(int warpgroup) const {
        return all + 4 * T::kStages + 2 + warpgroup;
    }

    __device__ __forceinline__ void init() const {
        for (int i = 0; i < T::kStages; ++i) {
            barrier_init(k_arrived(i), 1);
            barrier_init(v_arrived(i), 1);
            barrier_init(k_read(i), kAttentionWarps);
            barrier_init(v_read(i), kAttentionWarps);
        }
        barrier_init(scores_written(), 2 * kWarpgroupThreads);
        barrier_init(scores_read(), 2 * kWarpgroupThreads);
        for (int i = 0; i < 2; ++i) barrier_init(queries_written(i), kWarpgroupThreads);
    }
    // By a warp that has read a tile, after wgmma_wait().
    __device__ __forceinline__ void release(uint64_t* read) const {
        if (lane_of_thread() == 0) barrier_arrive(read);
    }
};

// --- the warp that copies ---

template <typename T>
__device__ __forceinline__ void copy_tile(unsigned char* target, const TensorMap& map, int32_t i_tile,
                                          int32_t kv_head, uint64_t* arrived) {
    barrier_arrive_expecting(arrived, T::kTileBytes);
    copy_box(target, map, i_tile * T::kKeys, kv_head * T::kChunks, arrived);
}

// By one thread. A tile of K is wanted before the tile of V before it.
template <typename T>
__device__ __forceinline__ void copy_tiles(const AttentionArguments& a, unsigned char* shared,
                                           const AttentionBarriers<T>& barriers, const KeyTiles& tiles) {
    const auto kv_head = static_cast<int32_t>(blockIdx.z);
    const int n = tiles.end - tiles.begin;
    const auto copy_k = [&](int i) {
        const int stage = i % T::kStages, round = i / T::kStages;
        if (round > 0) barrier_wait(barriers.k_read(stage), (round - 1) & 1);
        copy_tile<T>(shared + 2 * T::kQueryBytes + stage * T::kTileBytes, a.k, tiles.begin + i, kv_head,
                     barriers.k_arrived(stage));
    };
    const auto copy_v = [&](int i) {
        const int stage = i % T::kStages, round = i / T::kStages;
        if (round > 0) barrier_wait(barriers.v_read(stage), (round - 1) & 1);
        copy_tile<T>(shared + T::kValuesAt + stage * T::kTileBytes, a.v, tiles.begin + i, kv_head,
                     barriers.v_arrived(stage));
    };
    if (n > 0) copy_k(0);
    if (n > 0) copy_v(0);
    if (n > 1) copy_k(1);
    for (int i = 2; i < n; ++i) {
        copy_k(i);
        copy_v(i - 1);
    }
    if (n > 1) copy_v(n - 1);
}

// --- the warpgroups that compute ---

// A warpgroup's place: thread of it, its first row among those of the KV head, its first dimension.
struct Place {
    int warpgroup, thread, lane;
    int32_t row, dim;
};

template <typename T>
__device__ __forceinline__ Place place_of_thread() {
    const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroupThreads;
    const int32_t row = row_tile() * T::kRows;
    return {warpgroup, static_cast<int>(threadIdx.x) % kWarpgroupThreads, lane_of_thread(),
            T::kSharesRows ? row : row + warpgroup * kAttentionRows,
            T::kSharesRows ? warpgroup * kAttentionDims : 0};
}

// A row's token and head.
struct QueryRow {
    int32_t token, head;
};
__device__ __forceinline__ QueryRow query_row(const AttentionArguments& a, int32_t row, int32_t kv_head) {
    const int32_t token = row / a.group;
    return {token, kv_head * a.group + row - token * a.group};
}

// Eight values of q as float16.
template <bool is_half>
__device__ __forceinline__ uint4 half_queries(const void* q, int64_t offset) {
    if constexpr (is_half) {
        return *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(q) + offset);
    } else {
        const auto* fours = reinterpret_cast<const float4*>(static_cast<const float*>(q) + offset);
        const float4 low = fours[0], high = fours[1];
        return make_uint4(packed_half2(low.x, low.y), packed_half2(low.z, low.w), packed_half2(high.x, high.y),
                          packed_half2(high.z, high.w));
    }
}

// Writes a warpgroup's rows of q to shared memory as float16. Rows beyond the last repeat it: their results are not
// stored, and without conditions many loads are under way.
template <bool is_half>
__device__ __forceinline__ void load_queries(const AttentionArguments& a, const Place& place,
                                             unsigned char* queries) {
    constexpr int kEach = kAttentionRows / 4;
    unsigned char* target = queries + place.lane / 8 * (kAttentionRows * 128);
    const int32_t last = a.n_tokens * a.group - 1, piece = place.dim + 8 * place.lane;
    uint4 pairs[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const QueryRow at = query_row(a, min(place.row + 4 * i + place.thread / 32, last), blockIdx.z);
        pairs[i] = half_queries<is_half>(a.q, at.token * a.q_token + at.head * a.q_head + piece);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i)
        *reinterpret_cast<uint4*>(target + swizzled(4 * i + place.thread / 32, place.lane % 8)) = pairs[i];
}

// Adds the other warpgroup's half of the scores.
template <typename T>
__device__ __forceinline__ void add_scores(float (&s)[T::kParts][4], const Place& place, unsigned char* shared,
                                           const AttentionBarriers<T>& barriers, int i) {
    auto* own = reinterpret_cast<float4*>(shared + T::kScoresAt + place.warpgroup * T::kScoreBytes) + place.thread;
    const auto* other =
        reinterpret_cast<const float4*>(shared + T::kScoresAt + (1 - place.warpgroup) * T::kScoreBytes) +
        place.thread;
    if (i > 0) barrier_wait(barriers.scores_read(), (i - 1) & 1);
#pragma unroll
    for (int j = 0; j < T::kParts; ++j)
        own[j * kWarpgroupThreads] = make_float4(s[j][0], s[j][1], s[j][2], s[j][3]);
    barrier_arrive(barriers.scores_written());
    barrier_wait(barriers.scores_written(), i & 1);
#pragma unroll
    for (int j = 0; j < T::kParts; ++j) {
        const float4 x = other[j * kWarpgroupThreads];
        s[j][0] += x.x;
        s[j][1] += x.y;
        s[j][2] += x.z;
        s[j][3] += x.w;
    }
    barrier_arrive(barriers.scores_read());
}

constexpr float kLog2E = 1.44269504f;

// The running softmax of a thread's two rows, 8 apart; sums are of its own columns.
struct RunningSoftmax {
    float maximum[2], sum[2];
    float factor[2];  // by which earlier results are to be multiplied
};

// Scores of columns that a row does not see become -infinity. first_column: of this thread.
template <int n>
__device__ __forceinline__ void mask_scores(float (&s)[n][4], const AttentionArguments& a, int32_t row,
                                            int32_t first_column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int32_t token = (row + 8 * h) / a.group;
        const int32_t first = first_visible(a, token) - first_column, end = end_visible(a, token) - first_column;
#pragma unroll
        for (int j = 0; j < n; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int32_t column = 8 * j + e;
                if (column < first || column >= end) s[j][2 * h + e] = -INFINITY;
            }
        }
    }
}

// exp(s - the running maximum)
template <int n>
__device__ __forceinline__ void exponentials(float (&s)[n][4], RunningSoftmax& softmax) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float maximum = softmax.maximum[h];
#pragma unroll
        for (int j = 0; j < n; ++j) maximum = fmaxf(maximum, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
        maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
        // A row that has seen no column yet has no maximum.
        const float base = maximum == -INFINITY ? 0.0f : maximum * kLog2E;
        softmax.factor[h] = exp2_of(softmax.maximum[h] * kLog2E - base);
        softmax.maximum[h] = maximum;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < n; ++j) {
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; ++e) {
                s[j][e] = exp2_of(s[j][e] * kLog2E - base);
                sum += s[j][e];
            }
        }
        softmax.sum[h] = softmax.sum[h] * softmax.factor[h] + sum;
    }
}

template <int n>
__device__ __forceinline__ void pack_weights(uint32_t (&p)[n / 2][4], const float (&s)[n][4]) {
#pragma unroll
    for (int k = 0; k < n / 2; ++k) {
        p[k][0] = packed_half2(s[2 * k][0], s[2 * k][1]);
        p[k][1] = packed_half2(s[2 * k][2], s[2 * k][3]);
        p[k][2] = packed_half2(s[2 * k + 1][0], s[2 * k + 1][1]);
        p[k][3] = packed_half2(s[2 * k + 1][2], s[2 * k + 1][3]);
    }
}

template <int n>
__device__ __forceinline__ void scale_results(float (&o)[n][4], const RunningSoftmax& softmax) {
    // Mostly no row of the warp has a new maximum.
    if (!__any_sync(0xffffffffu, !(softmax.factor[0] == 1.0f && softmax.factor[1] == 1.0f))) return;
#pragma unroll
    for (int j = 0; j < n; ++j) {
        o[j][0] *= softmax.factor[0];
        o[j][1] *= softmax.factor[0];
        o[j][2] *= softmax.factor[1];
        o[j][3] *= softmax.factor[1];
    }
}

__device__ __forceinline__ void store_pair(void* out, int64_t at, float first, float second, FloatType type) {
    if (type == FloatType::f32) {
        *reinterpret_cast<float2*>(static_cast<float*>(out) + at) = make_float2(first, second);
    } else {
        *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(out) + at) = pair_of(first, second, type);
    }
}

// Of a block that computed all keys.
__device__ __forceinline__ void store_results(const float (&o)[32][4], const AttentionArguments& a,
                                              const Place& place, int32_t row, const float (&scale)[2],
                                              int n_dims) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        if (row + 8 * h >= a.n_tokens * a.group) continue;
        const QueryRow at = query_row(a, row + 8 * h, blockIdx.z);
        const int64_t begin = at.token * a.out_token + int64_t{at.head} * n_dims + place.dim + place.lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < 32; ++j)
            store_pair(a.out, begin + 8 * j, o[j][2 * h] * scale[h], o[j][2 * h + 1] * scale[h], a.type);
    }
}

// Index of a warpgroup's results among those of a split.
__device__ __forceinline__ int64_t partial_index(int n_tiles, int i_tile, int kv_head, int n_kv_heads, int split,
                                                 int warpgroup) {
    return ((int64_t{split} * n_kv_heads + kv_head) * n_tiles + i_tile) * 2 + warpgroup;
}

__device__ __forceinline__ void store_partial(const float (&o)[32][4], const Place& place,
                                              const RunningSoftmax& softmax, const float (&scale)[2],
                                              uint4* target, float2* sums) {
    target += place.thread;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        const auto& low = o[2 * j];
        const auto& high = o[2 * j + 1];
        target[j * kWarpgroupThreads] =
            make_uint4(packed_half2(low[0] * scale[0], low[1] * scale[0]),
                       packed_half2(low[2] * scale[1], low[3] * scale[1]),
                       packed_half2(high[0] * scale[0], high[1] * scale[0]),
                       packed_half2(high[2] * scale[1], high[3] * scale[1]));
    }
    if (place.lane % 4 == 0) {
        sums += place.thread / 32 * 16 + place.lane / 4;
        sums[0] = make_float2(softmax.maximum[0], softmax.sum[0]);
        sums[8] = make_float2(softmax.maximum[1], softmax.sum[1]);
    }
}

// o += p . v of a tile; the caller waits.
template <typename T>
__device__ __forceinline__ void add_values(float (&o)[32][4], const uint32_t (&p)[T::kSteps][4],
                                           const unsigned char* values) {
    const TransposedOperand v(values, T::kAtomBytes);
#pragma unroll
    for (int step = 0; step < T::kSteps; ++step) wgmma(o, p[step], v, step);
    wgmma_commit();
}

// s = q . k of a tile; the caller waits.
template <typename T>
__device__ __forceinline__ void start_scores(float (&s)[T::kParts][4], const SharedOperand& q,
                                             const unsigned char* keys) {
    const SharedOperand k(keys);
#pragma unroll
    for (int step = 0; step < kAttentionDims / 16; ++step)
        wgmma(s, q, step / 4 * kAttentionRows * 128, k, step / 4 * T::kAtomBytes, step % 4, step > 0);
    wgmma_commit();
}

template <typename T>
__device__ __forceinline__ void compute_tiles(const AttentionArguments& a, unsigned char* shared,
                                              const AttentionBarriers<T>& barriers, const KeyTiles& tiles) {
    const Place place = place_of_thread<T>();
    const int32_t row = place.row + place.thread / 32 * 16 + place.lane / 4;
    const SharedOperand q(shared + place.warpgroup * T::kQueryBytes);
    const unsigned char* keys = shared + 2 * T::kQueryBytes + place.dim / 64 * T::kAtomBytes;
    const unsigned char* values = shared + T::kValuesAt + place.dim / 64 * T::kAtomBytes;
    RunningSoftmax softmax = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}, {0.0f, 0.0f}};
    float o[32][4];
    uint32_t p[T::kSteps][4];
#pragma unroll
    for (auto& four : o) four[0] = four[1] = four[2] = four[3] = 0.0f;
    const int n = tiles.end - tiles.begin;

    const auto weights = [&](float (&s)[T::kParts][4], int i) {
        if constexpr (T::kSharesRows) add_scores<T>(s, place, shared, barriers, i);
        const int32_t first = (tiles.begin + i) * T::kKeys;
        if (first < tiles.all_first || first + T::kKeys > tiles.all_end)
            mask_scores(s, a, row, first + place.lane % 4 * 2);
        exponentials(s, softmax);
    };
    const auto begin_scores = [&](float (&s)[T::kParts][4], int i) {
        const int stage = i % T::kStages;
        barrier_wait(barriers.k_arrived(stage), i / T::kStages & 1);
        wgmma_fence();
        start_scores<T>(s, q, keys + stage * T::kTileBytes);
    };
    const auto begin_values = [&](int i) {
        const int stage = i % T::kStages;
        barrier_wait(barriers.v_arrived(stage), i / T::kStages & 1);
        wgmma_fence();
        add_values<T>(o, p, values + stage * T::kTileBytes);
    };

    if (n > 0) {
        float s[T::kParts][4];
        begin_scores(s, 0);
        wgmma_wait<0>();
        pin_results(s);
        barriers.release(barriers.k_read(0));
        weights(s, 0);
        pack_weights(p, s);
    }
    for (int i = 1; i < n; ++i) {
        float s[T::kParts][4];
        begin_scores(s, i);
        begin_values(i - 1);
        wgmma_wait<1>();
        pin_results(s);
        barriers.release(barriers.k_read(i % T::kStages));
        weights(s, i);
        wgmma_wait<0>();
        pin_results(o);
        barriers.release(barriers.v_read((i - 1) % T::kStages));
        scale_results(o, softmax);
        pack_weights(p, s);
    }
    if (n > 0) {
        begin_values(n - 1);
        wgmma_wait<0>();
        pin_results(o);
    }

    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        softmax.sum[h] += __shfl_xor_sync(0xffffffffu, softmax.sum[h], 1);
        softmax.sum[h] += __shfl_xor_sync(0xffffffffu, softmax.sum[h], 2);
        scale[h] = softmax.sum[h] == 0.0f ? 0.0f : 1.0f / softmax.sum[h];
    }
    if (a.n_splits == 1) {
        store_results(o, a, place, row, scale, T::kDims);
    } else {
        const int64_t index =
            partial_index(gridDim.x, row_tile(), blockIdx.z, gridDim.z, blockIdx.y, place.warpgroup);
        store_partial(o, place, softmax, scale, a.partial + index * 16 * kWarpgroupThreads,
                      a.sums + index * kAttentionRows);
    }
}

// Blocks (row tiles, n_splits, KV heads) of kAttentionThreads and kSharedBytes.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    attend_rows(const __grid_constant__ AttentionArguments a) {
    if constexpr (kIsHopper) {
        unsigned char* shared = swizzled_shared();
        const AttentionBarriers<T> barriers = {reinterpret_cast<uint64_t*>(shared + T::kBarriersAt)};
        const bool copies = threadIdx.x == 2 * kWarpgroupThreads;
        if (copies) {
            barriers.init();
            prefetch_map(a.k);
            prefetch_map(a.v);
        }
        publish_barriers();
        await_previous_kernel();
        const KeyTiles tiles = key_tiles<T>(a);
        if (threadIdx.x >= 2 * kWarpgroupThreads) {
            give_registers<kCopyingRegisters>();
            if (copies) copy_tiles<T>(a, shared, barriers, tiles);
        } else {
            take_registers<kComputingRegisters>();
            const Place place = place_of_thread<T>();
            unsigned char* queries = shared + place.warpgroup * T::kQueryBytes;
            if (a.q_is_half) {
                load_queries<true>(a, place, queries);
            } else {
                load_queries<false>(a, place, queries);
            }
            fence_shared_writes();
            barrier_arrive(barriers.queries_written(place.warpgroup));
            barrier_wait(barriers.queries_written(place.warpgroup), 0);
            compute_tiles<T>(a, shared, barriers, tiles);
        }
    }
}

// Of a row tile.
constexpr int kMergeThreads = 256, kMergeBlocks = 2 * 16 * kWarpgroupThreads / kMergeThreads;
// Splits whose results a thread reads at a time.
constexpr int kMergeBatch = 4;

// A thread's share of a merge: eight values of two rows, 8 apart, as store_partial() has them. The rows' maximum
// so far, and sums relative to it.
struct MergedRows {
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {}, value[8] = {};

    __device__ __forceinline__ void add(const float2 (&sums)[kMergeBatch][2], const uint4 (&o)[kMergeBatch]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float top = maximum[h];
#pragma unroll
            for (int i = 0; i < kMergeBatch; ++i) top = fmaxf(top, sums[i][h].x);
            const float factor = sum[h] == 0.0f ? 0.0f : exp2_of((maximum[h] - top) * kLog2E);
            sum[h] *= factor;
#pragma unroll
            for (int k = h; k < 4; k += 2) {
                value[2 * k] *= factor;
                value[2 * k + 1] *= factor;
            }
            maximum[h] = top;
#pragma unroll
            for (int i = 0; i < kMergeBatch; ++i) {
                // A split that saw no column has the maximum -infinity.
                const float own = sums[i][h].y;
                const float weight = own == 0.0f ? 0.0f : own * exp2_of((sums[i][h].x - top) * kLog2E);
                const uint32_t pairs[4] = {o[i].x, o[i].y, o[i].z, o[i].w};
                sum[h] += weight;
#pragma unroll
                for (int k = h; k < 4; k += 2) {
                    value[2 * k] += weight * half_to_float(static_cast<uint16_t>(pairs[k]));
                    value[2 * k + 1] += weight * half_to_float(static_cast<uint16_t>(pairs[k] >> 16));
                }
            }
        }
    }
};

// Adds the splits' results. Blocks (row tiles * kMergeBlocks, KV heads) of kMergeThreads.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads) merge_attention(const __grid_constant__ AttentionArguments a) {
    await_previous_kernel();
    const int index = blockIdx.x * (kMergeThreads / kWarpgroupThreads) + threadIdx.x / kWarpgroupThreads;
    const int j = index % 16, warpgroup = index / 16 % 2, i_tile = index / 32;
    const int n_tiles = gridDim.x / kMergeBlocks;
    const int thread = threadIdx.x % kWarpgroupThreads, lane = thread % 32, row = thread / 32 * 16 + lane / 4;
    MergedRows merged;
    for (int begin = 0; begin < a.n_splits; begin += kMergeBatch) {
        float2 sums[kMergeBatch][2];
        uint4 o[kMergeBatch];
#pragma unroll
        for (int i = 0; i < kMergeBatch; ++i) {
            sums[i][0] = sums[i][1] = make_float2(-INFINITY, 0.0f);
            o[i] = make_uint4(0, 0, 0, 0);
            if (begin + i >= a.n_splits) continue;
            const int64_t at = partial_index(n_tiles, i_tile, blockIdx.y, gridDim.y, begin + i, warpgroup);
            sums[i][0] = a.sums[at * kAttentionRows + row];
            sums[i][1] = a.sums[at * kAttentionRows + row + 8];
            o[i] = a.partial[(at * 16 + j) * kWarpgroupThreads + thread];
        }
        merged.add(sums, o);
    }
    const int32_t first = T::kSharesRows ? i_tile * T::kRows : i_tile * T::kRows + warpgroup * kAttentionRows;
    const int dim = (T::kSharesRows ? warpgroup * kAttentionDims : 0) + 16 * j + lane % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        if (first + row + 8 * h >= a.n_tokens * a.group) continue;
        const QueryRow at = query_row(a, first + row + 8 * h, blockIdx.y);
        const int64_t begin = at.token * a.out_token + int64_t{at.head} * T::kDims + dim;
        const float scale = 1.0f / merged.sum[h];
#pragma unroll
        for (int k = h; k < 4; k += 2) {
            store_pair(a.out, begin + k / 2 * 8, merged.value[2 * k] * scale, merged.value[2 * k + 1] * scale,
                       a.type);
        }
    }
}

}  // namespace pydiffusion::cuda
