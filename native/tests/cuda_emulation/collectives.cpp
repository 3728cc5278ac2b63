// Arithmetic of the warp's collectives. Compiled without ThreadSanitizer's checks, as emulate.cpp is:
// shuffles and votes exchange values, but order no memory.
#include "cuda_emulation/cuda.h"
#include "cuda_emulation/half.h"

namespace pydiffusion::emulation {

namespace {

constexpr uint32_t kLanes = 32;

// Each lane gets the value of the lane that source(lane) names; itself, if there is no such lane.
template <typename Source>
void shuffle(const Words* given, Words* got, uint32_t mask, const Source& source) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const uint32_t from = source(lane) < kLanes ? source(lane) : lane;
        if (!(mask >> from & 1))
            fail_in_collective("lane " + std::to_string(lane) + " shuffles from lane " +
                               std::to_string(from) + ", which is not in the mask");
        got[lane] = given[from];
    }
}

}  // namespace

void shuffle_xor(const Words* given, Words* got, uint32_t mask) {
    shuffle(given, got, mask, [&](uint32_t lane) { return lane ^ given[lane].word[0]; });
}

void shuffle_up(const Words* given, Words* got, uint32_t mask) {
    shuffle(given, got, mask, [&](uint32_t lane) { return lane - given[lane].word[0]; });
}

void shuffle_down(const Words* given, Words* got, uint32_t mask) {
    shuffle(given, got, mask, [&](uint32_t lane) { return lane + given[lane].word[0]; });
}

void shuffle_from(const Words* given, Words* got, uint32_t mask) {
    shuffle(given, got, mask, [&](uint32_t lane) { return given[lane].word[0] % kLanes; });
}

void ballot(const Words* given, Words* got, uint32_t mask) {
    uint32_t votes = 0;
    for (uint32_t lane = 0; lane < kLanes; ++lane)
        if (mask >> lane & 1) votes |= given[lane].word[0] << lane;
    for (uint32_t lane = 0; lane < kLanes; ++lane) got[lane].word[0] = votes;
}

namespace {

// Lane l = 4 g + t of a warp holds, two float16 a word: of A [16, 16] rows g and g + 8 at k = 2 t, 2 t + 1
// and the same + 8; of B [16, 8] those k at n = g; of D [16, 8] rows g and g + 8 at n = 2 t, 2 t + 1.
void multiply_tiles(const Words* given, Words* got, uint32_t) {
    float a[16][16], b[16][8];
    const auto half_of = [&](uint32_t lane, int word, int half) {
        return half_to_float(static_cast<uint16_t>(given[lane].word[word] >> 16 * half));
    };
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        const uint32_t g = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; ++half) {
            for (uint32_t i = 0; i < 4; ++i)
                a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = half_of(lane, 4 + static_cast<int>(i), half);
            for (uint32_t i = 0; i < 2; ++i)
                b[2 * t + half + i * 8][g] = half_of(lane, 8 + static_cast<int>(i), half);
        }
    }
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        for (uint32_t i = 0; i < 4; ++i) {
            const uint32_t row = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
            float value;
            std::memcpy(&value, &given[lane].word[i], sizeof value);
            double sum = 0.0;
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][n];
            value = static_cast<float>(value + sum);
            std::memcpy(&got[lane].word[i], &value, sizeof value);
        }
    }
}

}  // namespace

void mma_of_lane(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site& site) {
    Words words;
    std::memcpy(words.word, d, sizeof d);
    std::memcpy(words.word + 4, a, sizeof a);
    std::memcpy(words.word + 8, b, sizeof b);
    warp_collective("mma_16x8x16", 0xffffffffu, words, multiply_tiles, false, site);
    std::memcpy(d, words.word, sizeof d);
}

}  // namespace pydiffusion::emulation
