// Expert matmuls of repacked weights (backend/repacked_weights.h) on Hopper: warpgroups multiply weights,
// which are float16 in registers, by float16 activations in shared memory. Slots (a token and one of its
// experts each) are grouped by expert. The order of sums depends on the length of a row alone: a slot's
// result is the same in any tile and beside any other slots.
#pragma once

#include <cstdint>

#include "backend/cuda/expert_slots.cuh"
#include "backend/cuda/hopper.cuh"
#include "backend/cuda/repacked_formats.cuh"

namespace pydiffusion::cuda {

// The float16 operand of a matmul whose rows are gelu(gate) * up.
struct GatedOutput {
    unsigned char* rows;  // [slot][chunks of 32 * n_groups values], in pack_rows' order, zeros after them
    float* scales;        // [slot]
};

struct RepackedArguments {
    const unsigned char* weights;  // [n_experts][n_groups][group_bytes], aligned to 16
    int64_t expert_bytes;
    int32_t group_bytes, n_groups;  // of 64 rows
    int32_t n_values, n_chunks;     // of a row; all of x takes less than 2 GB
    const unsigned char* x;  // [n][n_chunks][kXChunkBytes], as pack_rows<PackOrder::even_odd>() writes it
    const float* x_scale;    // [n], x's rows are to be multiplied by this
    float* y;                // [slot][64 * n_groups]; not of a gated tile
    const int32_t* slots;    // sorted by expert; slot s multiplies x's row s / share
    const SlotTile* tiles;   // [the grid's y], of which n_tiles are used
    const int32_t* n_tiles;
    int32_t share;
    GatedOutput gated = {};  // of a gated tile
};

namespace {  // kernels

// A tile of 128 * kRowParts rows and 8 * kSlotParts slots for two warpgroups, in kStages stages of one chunk.
// Operands are unpacked while kSteps multiplications of 16 weights are under way: 2, or 4, a whole unit.
//
// Gated: the first half of an expert's groups are gate, the others up. A block has some groups of gate and
// those of up that belong to the same results, in turn.
template <typename Format_, int kRowParts_, int kSlotParts_, int kStages_, int kSteps_, bool kGated_ = false>
struct RepackedTile {
    using Format = Format_;
    static constexpr bool kGated = kGated_;
    static constexpr int kWarps = 8, kThreads = 32 * kWarps;
    static constexpr int kRowParts = kRowParts_, kSlotParts = kSlotParts_, kStages = kStages_,
                         kSteps = kSteps_;
    static constexpr int kGroups = 2 * kRowParts, kSlots = 8 * kSlotParts;
    // A stage: x in atoms of 64 values of all slots, a fifth one of sums of x, then the weights.
    static constexpr int kAtomBytes = kSlots * 128, kXBytes = (Format::kZeros ? 5 : 4) * kAtomBytes;
    static constexpr int kStageBytes = (kXBytes + kGroups * Format::kPieceBytes + 1023) / 1024 * 1024;
    static constexpr int kSharedBytes = kStages * (kStageBytes + static_cast<int>(sizeof(uint64_t)));
    // As Tile's (expert_matmul_kernels.cuh).
    static constexpr int kBlocks = 228 * 1024 / (kSharedBytes + 1024);
    static_assert(kSlotParts <= 3 && kStages >= 2 && kBlocks >= 1 && (kSteps == 2 || kSteps == 4));
    static_assert(!kGated || kRowParts <= 2);
};

// How a matmul is launched: grid (n_row_blocks, n_tiles), where n_tiles is the most that group_slots() can
// make.
struct RepackedLaunch {
    int64_t n_row_blocks, n_tiles;
};

template <typename T>
RepackedLaunch repacked_launch_of(int64_t n_rows, int64_t n_experts, int64_t n_slots) {
    constexpr int64_t kRows = 64 * T::kGroups;
    return {(n_rows + kRows - 1) / kRows, n_experts + n_slots / T::kSlots};
}

// A block's copies to shared memory, one chunk after the other: weights by bulk copies of thread 0, x by all.
template <typename T>
struct RepackedCopies {
    using Format = typename T::Format;
    const RepackedArguments& a;
    unsigned char* stages;
    uint64_t* arrived;             // a barrier for the weights of each stage
    const unsigned char* weights;  // the expert's
    int32_t first_group, chunk = 0, stage = 0;
    SharedAddress target, sums_target;     // of a lane's pieces of x, in the first stage
    int32_t x_offsets[T::kSlotParts + 1];  // of its pieces, the last one of sums; -1: none

    __device__ __forceinline__ RepackedCopies(const RepackedArguments& arguments, unsigned char* shared,
                                              const SlotTile& tile, int32_t group)
        : a(arguments),
          stages(shared),
          arrived(reinterpret_cast<uint64_t*>(shared + T::kStages * T::kStageBytes)),
          weights(a.weights + tile.expert * a.expert_bytes),
          first_group(group) {
        // A warp copies the values of whole slots, 8 slots apart; sums, 4 pieces a slot, are the first
        // threads'.
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const SharedAddress base = shared_address(stages);
        target = base + (lane / 8 * T::kAtomBytes + swizzled(warp, lane % 8));
        sums_target = base + (4 * T::kAtomBytes + swizzled(threadIdx.x / 4, lane % 4));
#pragma unroll
        for (int i = 0; i <= T::kSlotParts; ++i) {
            const int slot = i < T::kSlotParts ? warp + i * T::kWarps : threadIdx.x / 4;
            const int piece = i < T::kSlotParts ? lane : 32 + lane % 4;
            x_offsets[i] = -1;
            if (slot < tile.n)
                x_offsets[i] = a.slots[tile.begin + slot] / a.share * a.n_chunks * kXChunkBytes + piece * 16;
        }
        if (threadIdx.x == 0) {
            for (int i = 0; i < T::kStages; ++i) barrier_init(arrived + i, 1);
        }
        publish_barriers();
    }

    // The number of the block's i-th group.
    __device__ __forceinline__ int32_t group_of(int i) const {
        return T::kGated ? (first_group + i) / 2 + i % 2 * (a.n_groups / 2) : first_group + i;
    }

    __device__ __forceinline__ void copy_weights(int32_t chunk, int stage) const {
        if (threadIdx.x != 0) return;
        const int n_bytes = Format::n_blocks(a.n_values - chunk * kChunk) * (Format::kPieceBytes / 8);
        const int n_groups = a.n_groups - first_group < T::kGroups ? a.n_groups - first_group : T::kGroups;
        const unsigned char* from = weights + chunk * Format::kPieceBytes;
        unsigned char* to = stages + stage * T::kStageBytes + T::kXBytes;
        barrier_arrive_expecting(arrived + stage, n_groups * n_bytes);
#pragma unroll 1
        for (int i = 0; i < n_groups; ++i)
            copy_bulk(to + i * Format::kPieceBytes, from + static_cast<int64_t>(group_of(i)) * a.group_bytes,
                      n_bytes, arrived + stage);
    }

    __device__ __forceinline__ void copy_x() const {
        const unsigned char* x = a.x + chunk * kXChunkBytes;
        const int to = stage * T::kStageBytes;
#pragma unroll
        for (int i = 0; i < T::kSlotParts; ++i) {
            if (x_offsets[i] >= 0) copy_async_16(target + to + i * T::kWarps * 128, x + x_offsets[i]);
        }
        if (Format::kZeros && x_offsets[T::kSlotParts] >= 0)
            copy_async_16(sums_target + to, x + x_offsets[T::kSlotParts]);
    }

    // The weights of the first copies, before x is known.
    __device__ __forceinline__ void copy_first_weights() const {
        for (int i = 0; i < T::kStages - 1 && i < a.n_chunks; ++i) copy_weights(i, i);
    }

    __device__ __forceinline__ void copy_next(bool with_weights = true) {
        if (chunk < a.n_chunks) {
            if (with_weights) copy_weights(chunk, stage);
            copy_x();
            ++chunk;
            if (++stage == T::kStages) stage = 0;
        }
        copy_async_commit();
    }
};

// A gated tile writes gelu(gate) * up times this, a power of two, as float16. It is the same for all rows, as
// no block knows a row's maximum. Values have 11 bits from 2^-11 to 65504 * 8, below they are multiples of
// 2^-21: rows whose largest value is at least 0.004 lose less than a tenth in precision, at 0.001 it is half.
// Larger values become 65504 * 8; NaN and infinity stay what they are. A sum of 16 beyond that is infinite:
// the step then reports results that are not finite, rather than to go on with a wrong sum.
constexpr float kGatedFactor = 1.0f / 8.0f;

__device__ __forceinline__ float saturated(float x) {
    constexpr float kMost = 65504.0f;
    return fabsf(x) <= FLT_MAX ? fminf(fmaxf(x, -kMost), kMost) : x;
}

// scaled_up: times kGatedFactor
__device__ __forceinline__ float gated(float gate, float scaled_up) {
    return saturated(gelu(gate) * scaled_up);
}

template <int n>
__device__ __forceinline__ void add_scaled_parts(float (&sums)[n][4], float low, float high,
                                                 const float (&partial)[n][4]) {
#pragma unroll
    for (int part = 0; part < n; ++part) add_scaled(sums[part], low, high, partial[part]);
}

// Adds a chunk's part to the sums of a warp's 16 rows in a group.
template <typename T, int n>
__device__ __forceinline__ void add_piece(float (&sums)[n][4], const SharedOperand& x, const Piece& piece) {
    using Format = typename T::Format;
    constexpr bool kLoadsAhead = T::kSteps == 4;
    const int quarter = threadIdx.x / 32 % 4;
    typename Format::Head head;
    typename Format::Words words;
    Format::load_head(piece, quarter, head);
    Format::load(piece, quarter, 0, words);
    const typename Format::Row rows[2] = {Format::decode(head, 0), Format::decode(head, 1)};
    float partial[n][4];
    if constexpr (Format::kZeros) {  // the nearest float16 of the sums, then what they lack
        uint32_t zeros[4];
        Format::zeros(rows[0], rows[1], zeros);
        wgmma_fence();
        wgmma(partial, zeros, x, 4 * T::kAtomBytes, 0, false);
        wgmma(partial, zeros, x, 4 * T::kAtomBytes, 1, true);
        wgmma_commit();
    }
    uint32_t a[2][4][4];
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
        uint32_t (&operands)[4][4] = a[kLoadsAhead ? unit % 2 : 0];
        const int i = unit / Format::kWordUnits;
        if (!kLoadsAhead && unit > 0 && unit % Format::kWordUnits == 0)
            Format::load(piece, quarter, i, words);
        Format::unpack(words, rows, unit, operands);
        if (kLoadsAhead && unit + 1 < kUnits && (unit + 1) % Format::kWordUnits == 0)
            Format::load(piece, quarter, i + 1, words);
        if constexpr (Format::kZeros) {
            if (unit == 0) {
                wgmma_wait<0>();
                pin_results(partial);
                add_scaled_parts(sums, Format::zero_factor(rows[0]), Format::zero_factor(rows[1]), partial);
            }
        }
#pragma unroll
        for (int first = 0; first < 4; first += T::kSteps) {
            wgmma_fence();
#pragma unroll
            for (int step = first; step < first + T::kSteps; ++step)
                wgmma(partial, operands[step], x, unit * T::kAtomBytes, step, unit + step > 0);
            wgmma_commit();
            wgmma_wait<1>();
        }
    }
    wgmma_wait<0>();
    pin_results(partial);
    add_scaled_parts(sums, Format::factor(rows[0]), Format::factor(rows[1]), partial);
}

// Lane s: the tile's slot s, and the scale of its x.
struct LaneSlot {
    int32_t slot = 0;
    float scale = 0.0f;

    __device__ __forceinline__ LaneSlot(const RepackedArguments& a, const SlotTile& tile) {
        const int lane = threadIdx.x % 32;
        if (lane >= tile.n) return;
        slot = a.slots[tile.begin + lane];
        scale = a.x_scale[slot / a.share];
    }
};

// Writes the results of a warpgroup's groups, from `group` on.
template <typename T, int n>
__device__ __forceinline__ void write_groups(const float (&sums)[T::kRowParts][n][4],
                                             const RepackedArguments& a, const SlotTile& tile,
                                             const LaneSlot& own, int32_t group) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int32_t row = 64 * group + threadIdx.x / 32 % 4 * 16 + g;
#pragma unroll
    for (int part = 0; part < n; ++part) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int slot = 8 * part + 2 * t + j;
            const int32_t c = __shfl_sync(kAllLanes, own.slot, slot);
            const float scale = __shfl_sync(kAllLanes, own.scale, slot);
            float* y = a.y + static_cast<int64_t>(c) * (64 * a.n_groups) + row;
#pragma unroll
            for (int i = 0; i < T::kRowParts; ++i) {
                if (slot >= tile.n || group + i >= a.n_groups) continue;
                y[64 * i] = sums[i][part][j] * scale;
                y[64 * i + 8] = sums[i][part][2 + j] * scale;
            }
        }
    }
}

// A slot's 16 rows of a warp: of lane (g, t), slot g's rows r, r + 2, r + 8 and r + 10, r = 4 (t / 2) + t
// % 2.
struct Sixteen {
    uint32_t rows[2];  // r and r + 8, then r + 2 and r + 10
    float sum;

    // v as add_piece()'s sums: rows g, then g + 8, of slots 2t and 2t + 1.
    __device__ __forceinline__ void gather(const float (&v)[4]) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const uint32_t of_slots[2] = {half2_of(v[0], v[2]), half2_of(v[1], v[3])};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int from = 4 * (4 * (t / 2) + t % 2 + 2 * i) + g / 2;
            const uint32_t even = __shfl_sync(kAllLanes, of_slots[0], from);
            const uint32_t odd = __shfl_sync(kAllLanes, of_slots[1], from);
            rows[i] = g % 2 ? odd : even;
        }
        sum = low_half(rows[0]) + low_half(rows[1]) + (high_half(rows[0]) + high_half(rows[1]));
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
    }

    __device__ __forceinline__ void write(unsigned char* chunk, int sixteen) const {
        const int t = threadIdx.x % 4;
        uint32_t* to = reinterpret_cast<uint32_t*>(chunk + 32 * sixteen + 16 * (t % 2) + 4 * (t / 2));
        to[0] = byte_permute(rows[0], rows[1], 0x5410);
        to[2] = byte_permute(rows[0], rows[1], 0x7632);
        if (t == 0) write_sum(chunk, sixteen, sum);
    }
};

// Writes gelu(gate) * up of a warpgroup's slots, scaled by kGatedFactor. `free`: a stage that is not in use.
template <typename T, int n>
__device__ __forceinline__ void write_gated(const float (&sums)[T::kRowParts][n][4],
                                            const RepackedArguments& a, const SlotTile& tile,
                                            const LaneSlot& own, int32_t group, unsigned char* free) {
    float up[n][4];
    if constexpr (T::kRowParts == 2) {
        memcpy(up, sums[1], sizeof up);
    } else {  // the second warpgroup has it
        float* exchange = reinterpret_cast<float*>(free) + threadIdx.x % 128;
#pragma unroll
        for (int i = 0; i < 4 * n; ++i)
            if (threadIdx.x >= 128) exchange[128 * i] = sums[0][i / 4][i % 4];
        __syncthreads();
        if (threadIdx.x >= 128) return;
#pragma unroll
        for (int i = 0; i < 4 * n; ++i) up[i / 4][i % 4] = exchange[128 * i];
    }
    if (group >= a.n_groups) return;
    const int lane = threadIdx.x % 32, quarter = threadIdx.x / 32 % 4;
    const int32_t pair = group / 2, n_pairs = a.n_groups / 2, n_chunks = (n_pairs + 3) / 4;
    if (pair == 0 && quarter == 0 && lane < tile.n) a.gated.scales[own.slot] = 1.0f / kGatedFactor;
    // All parts before the first branch, so that their latencies overlap.
    Sixteen sixteens[n];
    unsigned char* chunks[n];
#pragma unroll
    for (int part = 0; part < n; ++part) {
        const float scales[2] = {__shfl_sync(kAllLanes, own.scale, 8 * part + lane % 4 * 2),
                                 __shfl_sync(kAllLanes, own.scale, 8 * part + lane % 4 * 2 + 1)};
        float v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            v[j] = gated(sums[0][part][j] * scales[j % 2], up[part][j] * (scales[j % 2] * kGatedFactor));
        sixteens[part].gather(v);
        const int64_t row = __shfl_sync(kAllLanes, own.slot, 8 * part + lane / 4);
        chunks[part] = a.gated.rows + (row * n_chunks + pair / 4) * kXChunkBytes;
    }
#pragma unroll
    for (int part = 0; part < n; ++part) {
        if (8 * part + lane / 4 >= tile.n) break;
        sixteens[part].write(chunks[part], 4 * (pair % 4) + quarter);
    }
    if (pair < n_pairs - 1) return;
#pragma unroll
    for (int part = 0; part < n; ++part) {
        if (8 * part + lane / 4 >= tile.n) break;
        for (int rest = pair % 4 + 1; rest < 4; ++rest) Sixteen{}.write(chunks[part], 4 * rest + quarter);
    }
}

// Multiplies the block's tile, with as few parts of 8 slots as it needs.
template <int n, typename T>
__device__ __forceinline__ void multiply_groups(RepackedCopies<T>& copies, const RepackedArguments& a,
                                                const SlotTile& tile) {
    using Format = typename T::Format;
    if constexpr (n > 1) {
        if (tile.n <= 8 * (n - 1)) return multiply_groups<n - 1>(copies, a, tile);
    }
    // Lanes don't differ, as the compiler learns by the shuffle: branches on it are not divergent.
    const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 128), 0);
    const int32_t group = copies.first_group + warpgroup * T::kRowParts;
    float sums[T::kRowParts][n][4] = {};
    const LaneSlot own(a, tile);
    int stage = 0;
    uint32_t phase = 0;
    for (int32_t chunk = 0; chunk < a.n_chunks; ++chunk) {
        copy_async_wait<T::kStages - 2>();
        fence_shared_writes();
        __syncthreads();  // the stage's x has arrived for all; the stage before it is free
        barrier_wait(copies.arrived + stage, phase);
        copies.copy_next();
        const unsigned char* shared = copies.stages + stage * T::kStageBytes;
        const SharedOperand x(shared);
        const int n_blocks = Format::n_blocks(a.n_values - chunk * kChunk);
#pragma unroll
        for (int i = 0; i < T::kRowParts; ++i) {
            if (group + i >= a.n_groups) break;
            const int piece = warpgroup * T::kRowParts + i;
            add_piece<T>(sums[i], x, {shared + T::kXBytes + piece * Format::kPieceBytes, n_blocks});
        }
        if (++stage == T::kStages) {
            stage = 0;
            phase ^= 1;
        }
    }
    if constexpr (T::kGated)
        write_gated<T>(sums, a, tile, own, group, copies.stages + stage * T::kStageBytes);
    else
        write_groups<T>(sums, a, tile, own, group);
}

// See RepackedLaunch. kStartsEarly: slots and tiles were known before the kernel before this one.
template <typename T, bool kStartsEarly = false>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks) repacked_matmul(const RepackedArguments a) {
    if constexpr (kIsHopper) {
        if (!kStartsEarly) await_previous_kernel();
        const SlotTile tile = a.tiles[blockIdx.y];  // not after n_tiles: both loads at once
        if (static_cast<int32_t>(blockIdx.y) >= *a.n_tiles) {
            if (kStartsEarly) await_previous_kernel();
            return;
        }
        RepackedCopies<T> copies(a, swizzled_shared(), tile, static_cast<int32_t>(blockIdx.x) * T::kGroups);
        if (kStartsEarly) {
            copies.copy_first_weights();
            await_previous_kernel();
        }
        for (int i = 0; i < T::kStages - 1; ++i) copies.copy_next(!kStartsEarly);
        multiply_groups<T::kSlotParts>(copies, a, tile);
    } else {
        __trap();
    }
}

}  // namespace

}  // namespace pydiffusion::cuda
