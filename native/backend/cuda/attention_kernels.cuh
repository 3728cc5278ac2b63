// Flash attention on Hopper: softmax(q . k) v over rows of a float16 cache, by warpgroup matmuls. A block has
// two warpgroups that compute and one of which a thread copies. It computes 128 rows (a token and one of the
// query heads of a KV head) of 256 dimensions, 64 a warpgroup, or 64 rows of 512 dimensions, of which each
// warpgroup has half and adds the other's half of the scores. Keys may be split among blocks;
// merge_attention() then adds their results.
#pragma once

#include "backend/cuda/attention_results.cuh"

namespace pydiffusion::cuda {

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

// Eight values of q as float16.
template <bool is_half>
__device__ __forceinline__ uint4 half_queries(const void* q, int64_t offset) {
    if constexpr (is_half) {
        return *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(q) + offset);
    } else {
        const auto* fours = reinterpret_cast<const float4*>(static_cast<const float*>(q) + offset);
        const float4 low = fours[0], high = fours[1];
        return make_uint4(packed_half2(low.x, low.y), packed_half2(low.z, low.w),
                          packed_half2(high.x, high.y), packed_half2(high.z, high.w));
    }
}

// Writes a warpgroup's rows of q to shared memory as float16. Rows beyond the last repeat it: their results
// are not stored, and without conditions many loads are under way.
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
__device__ __forceinline__ void add_scores(float (&s)[T::kParts][4], const Place& place,
                                           unsigned char* shared, const AttentionBarriers<T>& barriers,
                                           int i) {
    auto* own =
        reinterpret_cast<float4*>(shared + T::kScoresAt + place.warpgroup * T::kScoreBytes) + place.thread;
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

// A warpgroup's rows of q times all tiles of the block. While the values of a tile are multiplied, the scores
// of the next get their softmax.
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
    store_rows(o, a, place, softmax, T::kDims);
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

}  // namespace pydiffusion::cuda
