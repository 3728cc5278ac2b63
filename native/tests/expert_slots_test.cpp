// The slots of experts on the emulated GPU: each exactly once, in tiles of one expert.
#include "backend/cuda/expert_slots.cuh"

#include <algorithm>

#include "expert_cases.h"
#include "layer_kernels_runs.h"

namespace pydiffusion {
namespace testing {

namespace {

struct Grouping {
    int32_t n_experts, n_used, n_tokens, stride, tile;
    std::vector<int32_t> ids() const {
        std::vector<int32_t> all(static_cast<size_t>(n_tokens) * stride, -9);
        for (int32_t c = 0; c < n_tokens * n_used; ++c)
            all[c / n_used * stride + c % n_used] = c * 7919 % (n_experts + 2) - 1;  // -1 and n_experts too
        return all;
    }
};

// The slots of each expert in order, then the tiles, of experts in order.
std::vector<float> group(const Grouping& g, Order order) {
    const int32_t n = g.n_tokens * g.n_used;
    const std::vector<int32_t> ids = g.ids();
    std::vector<int32_t> slots(n, -1);
    std::vector<SlotTile> tiles(g.n_experts + n / g.tile);
    int32_t n_tiles = -1;
    emulate(1, kGroupThreads, 0, order, [&] {
        group_slots(ids.data(), g.stride, g.n_used, g.n_tokens, g.n_experts, g.tile, slots.data(),
                    tiles.data(), &n_tiles);
    });
    std::vector<float> all;
    for (int32_t i = 0; i < n_tiles; ++i) {
        const SlotTile& tile = tiles.at(i);
        std::sort(slots.begin() + tile.begin, slots.begin() + tile.begin + tile.n);
        for (const int32_t value : {tile.expert, tile.begin, tile.n})
            all.push_back(static_cast<float>(value));
    }
    // Between an expert's tiles the order is that of arrival too.
    for (int32_t i = 0, next = 0; i < n_tiles; i = next) {
        int32_t n_slots = 0;
        for (next = i; next < n_tiles && tiles[next].expert == tiles[i].expert; ++next)
            n_slots += tiles[next].n;
        std::sort(slots.begin() + tiles[i].begin, slots.begin() + tiles[i].begin + n_slots);
    }
    all.insert(all.end(), slots.begin(), slots.end());
    return all;
}

std::vector<float> expected_groups(const Grouping& g) {
    std::vector<float> tiles, slots;
    const std::vector<int32_t> ids = g.ids();
    for (int32_t expert = 0; expert < g.n_experts; ++expert) {
        const auto first = static_cast<int32_t>(slots.size());
        for (int32_t c = 0; c < g.n_tokens * g.n_used; ++c)
            if (ids[c / g.n_used * g.stride + c % g.n_used] == expert) slots.push_back(static_cast<float>(c));
        const auto end = static_cast<int32_t>(slots.size());
        for (int32_t at = first; at < end; at += g.tile)
            for (const int32_t value : {expert, at, std::min(g.tile, end - at)})
                tiles.push_back(static_cast<float>(value));
    }
    slots.resize(g.n_tokens * g.n_used, -1.0f);
    tiles.insert(tiles.end(), slots.begin(), slots.end());
    return tiles;
}

}  // namespace

TEST_CASE("group_slots: few and many slots, experts and strides") {
    const Grouping cases[] = {{1, 1, 1, 1, 24},    {3, 2, 5, 2, 4},       {128, 8, 256, 8, 24},
                              {130, 8, 30, 11, 2}, {40, 8, 600, 8, 24},   {40, 7, 700, 9, 24},
                              {1024, 8, 64, 8, 1}, {1000, 3, 1400, 3, 24}};
    for (const Grouping& g : cases) {
        if (kDetectsRaces && g.n_experts != 40) continue;
        CAPTURE(g.n_experts);
        CAPTURE(g.n_tokens);
        CHECK(same(group(g, Order::random), expected_groups(g)));
    }
}

TEST_CASE("group_slots: every barrier and every mask is needed") {
    check_mutations([](Order order) { return group({300, 8, 60, 8, 2}, order); }, 4, 6);
}

}  // namespace testing
}  // namespace pydiffusion
