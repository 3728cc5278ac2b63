// Repacked matmuls of gate and up that write the float16 operand of the next matmul, on the emulated GPU.
#include <algorithm>

#include "packed_rows.h"
#include "repacked_runs.h"

namespace pydiffusion {
namespace testing {

namespace {

using namespace cuda;
using emulation::kOrders;
using emulation::Order;

struct GatedRun {
    std::vector<unsigned char> rows;  // 0xff where nothing was written
    std::vector<float> scales;
    bool operator==(const GatedRun& other) const { return rows == other.rows && scales == other.scales; }
};

int32_t n_chunks_of_result(const ExpertCase& c) { return (c.n_rows / 2 + kChunk - 1) / kChunk; }

template <typename T>
GatedRun run_gated(ggml_type type, const ExpertCase& c, const std::vector<uint8_t>& weights,
                   const std::vector<float>& x, const std::vector<int32_t>& ids, Order order) {
    RepackedRun<T> run(type, c, weights, x, ids, order);
    const size_t n_bytes = static_cast<size_t>(c.n_slots()) * n_chunks_of_result(c) * kXChunkBytes;
    GatedRun result = {std::vector<unsigned char>(n_bytes, 0xff), std::vector<float>(c.n_slots(), -1.0f)};
    run.arguments.gated = {result.rows.data(), result.scales.data()};
    run.multiply();
    return result;
}

// Activations whose matmuls with QuantizedRows are neither tiny nor huge: rows of several magnitudes.
std::vector<float> moderate_activations(const ExpertCase& c) {
    std::vector<float> x = random_values(static_cast<size_t>(c.n_x()) * c.n_values, 2);
    for (size_t i = 0; i < x.size(); ++i) x[i] *= i / c.n_values % 2 ? 0.03f : 0.2f;
    return x;
}

// Values are what the plain matmul T gives, gated and rounded; the same in other orders of threads and by
// other tiles.
template <typename T, typename Gated, typename OtherGated>
void check_gated(ggml_type type, const ExpertCase& c) {
    CAPTURE(ggml_type_name(type));
    CAPTURE(c.n_rows);
    const QuantizedRows weights(type, int64_t{c.n_experts} * c.n_rows, c.n_values, 1);
    const std::vector<float> x = moderate_activations(c);
    const std::vector<int32_t> ids = choose_experts(c);
    const std::vector<float> y = run<T>(type, c, weights.bytes, x, ids, Order::forward);
    const GatedRun gated = run_gated<Gated>(type, c, weights.bytes, x, ids, Order::forward);
    const std::vector<PackedRow> rows = unpacked(PackOrder::even_odd, gated.rows.data(), gated.scales.data(),
                                                 c.n_slots(), n_chunks_of_result(c));
    const int32_t n = c.n_rows / 2;
    for (int32_t slot = 0; slot < c.n_slots(); ++slot) {
        const float* gate = y.data() + int64_t{slot} * c.n_rows;
        for (int32_t i = 0; i < n_chunks_of_result(c) * kChunk; ++i) {
            const float expected = i < n ? cuda::gated(gate[i], gate[n + i] * kGatedFactor) : 0.0f;
            const float rounded = half_to_float(static_cast<uint16_t>(half2_of(expected, 0.0f)));
            if (rows[slot].values[i] != static_cast<double>(rounded) / kGatedFactor)
                FAIL_CHECK("slot ", slot, ", value ", i);
        }
        for (size_t i = 0; i < rows[slot].sums.size(); ++i)
            if (!is_sum_right(rows[slot], i, 0x1p-24 / kGatedFactor)) FAIL_CHECK("slot ", slot, ", sum ", i);
    }
    for (const Order order : {Order::backward, Order::random})
        CHECK(run_gated<Gated>(type, c, weights.bytes, x, ids, order) == gated);
    CHECK(run_gated<OtherGated>(type, c, weights.bytes, x, ids, Order::forward) == gated);
}

using Tile4 = RepackedTile<RepackedQ4K, 2, 3, 2, 4>;
using Tile6 = RepackedTile<RepackedQ6K, 1, 3, 2, 2>;
using Tile8 = RepackedTile<RepackedQ80, 1, 3, 2, 2>;
// Those of the backend, and others.
using Gated4 = RepackedTile<RepackedQ4K, 2, 3, 2, 4, true>;
using Gated6 = RepackedTile<RepackedQ6K, 1, 3, 2, 2, true>;
using Gated8 = RepackedTile<RepackedQ80, 1, 3, 2, 2, true>;
using Other4 = RepackedTile<RepackedQ4K, 1, 1, 3, 2, true>;
using Other6 = RepackedTile<RepackedQ6K, 2, 2, 3, 4, true>;
using Other8 = RepackedTile<RepackedQ80, 2, 1, 3, 4, true>;

}  // namespace

TEST_CASE("gated repacked matmul: every format at awkward shapes") {
    // One to five groups of gate, so that chunks are partly empty and a tile lacks groups.
    check_gated<Tile4, Gated4, Other4>(GGML_TYPE_Q4_K, {3, 128, 256, 9, 2, true});
    check_gated<Tile4, Gated4, Other4>(GGML_TYPE_Q4_K, {2, 384, 768, 14, 1, true});
    check_gated<Tile4, Gated4, Other4>(GGML_TYPE_Q4_K, {1, 640, 256, 26, 1, true});
    check_gated<Tile6, Gated6, Other6>(GGML_TYPE_Q6_K, {2, 256, 512, 17, 1, true});
    check_gated<Tile6, Gated6, Other6>(GGML_TYPE_Q6_K, {1, 640, 256, 3, 1, true});
    check_gated<Tile8, Gated8, Other8>(GGML_TYPE_Q8_0, {3, 128, 352, 3, 2, true});
    check_gated<Tile8, Gated8, Other8>(GGML_TYPE_Q8_0, {2, 512, 32, 18, 1, true});
}

TEST_CASE("gated repacked matmul: the next matmul is precise") {
    const ExpertCase both = {2, 384, 512, 12, 1, true}, down = {2, 64, 192, 12, 1, false};
    const QuantizedRows weights(GGML_TYPE_Q4_K, 2 * 384, 512, 1),
        weights_down(GGML_TYPE_Q8_0, 2 * 64, 192, 2);
    const std::vector<float> x = moderate_activations(both);
    const std::vector<int32_t> ids = choose_experts(both);
    const GatedRun gated = run_gated<Gated4>(GGML_TYPE_Q4_K, both, weights.bytes, x, ids, Order::forward);
    std::vector<float> hidden;
    for (const PackedRow& row : unpacked(PackOrder::even_odd, gated.rows.data(), gated.scales.data(), 12, 1))
        hidden.insert(hidden.end(), row.values.begin(), row.values.begin() + 192);
    RepackedRun<Tile8> next(GGML_TYPE_Q8_0, down, weights_down.bytes, hidden, ids, Order::forward);
    std::vector<float> y(12 * 64, NAN);
    next.arguments.x = gated.rows.data();
    next.arguments.x_scale = gated.scales.data();
    next.arguments.y = y.data();
    next.multiply<true>();
    CHECK(worst_error(down, weights_down, hidden, ids, y) < 0x1p-11);
}

TEST_CASE("gated repacked matmul: a slot's result does not depend on other slots") {
    const QuantizedRows weights(GGML_TYPE_Q4_K, 128, 512, 3);
    const std::vector<float> x = random_values(24 * 512, 4);
    const auto of_last = [&](int32_t n) {
        return run_gated<Gated4>(GGML_TYPE_Q4_K, {1, 128, 512, n, 1, true}, weights.bytes,
                                 std::vector<float>(x.end() - n * 512, x.end()), std::vector<int32_t>(n, 0),
                                 Order::forward)
            .rows;
    };
    const auto together = of_last(24);
    for (const int32_t some : {1, 7, 8, 9, 15, 16, 17, 23}) {
        const auto apart = of_last(some);
        CHECK(std::equal(apart.begin(), apart.end(), together.end() - some * kXChunkBytes));
    }
}

TEST_CASE("gated repacked matmul: finite values stay finite, NaN and infinity stay what they are") {
    const float infinity = std::numeric_limits<float>::infinity();
    const auto half = [](float gate, float up) {
        return half_to_float(static_cast<uint16_t>(half2_of(cuda::gated(gate, up * kGatedFactor), 0.0f)));
    };
    CHECK(half(1e4f, 1e4f) == 65504.0f);
    CHECK(half(1e4f, -1e4f) == -65504.0f);
    CHECK(half(512.0f, 512.0f) == 0x1p18f * kGatedFactor);
    CHECK(half(-1e9f, 1e9f) == 0.0f);
    CHECK(half(infinity, 1.0f) == infinity);
    CHECK(std::isnan(half(infinity, 0.0f)));
    CHECK(std::isnan(half(NAN, 1.0f)));
    CHECK(std::isnan(half(1.0f, NAN)));
}

TEST_CASE("gated repacked matmul: NaN stays in its slot, zeros give zeros, a wrong id gives nothing") {
    const ExpertCase c = {2, 128, 256, 4, 1, true};
    std::vector<float> x = random_values(4 * 256, 4);
    x[7] = NAN;
    std::fill_n(x.begin() + 256, 256, 0.0f);
    const std::vector<uint8_t> weights = QuantizedRows(GGML_TYPE_Q8_0, 2 * 128, 256, 3).bytes;
    const GatedRun gated = run_gated<Gated8>(GGML_TYPE_Q8_0, c, weights, x, {0, 0, 0, 7}, Order::forward);
    const auto rows = unpacked(PackOrder::even_odd, gated.rows.data(), gated.scales.data(), 4, 1);
    for (int i = 0; i < 64; ++i) {
        CHECK(std::isnan(rows[0].values[i]));
        CHECK(rows[1].values[i] == 0.0);
        CHECK(std::isfinite(rows[2].values[i]));
    }
    CHECK(std::all_of(gated.rows.end() - kXChunkBytes, gated.rows.end(),
                      [](int byte) { return byte == 0xff; }));
    CHECK(gated.scales[3] == -1.0f);
}

TEST_CASE("gated repacked matmul: every barrier and every mask is needed") {
    // Three chunks: the exchange of up takes a stage that has been used.
    const ExpertCase c = {1, 256, 768, 11, 1, true};
    const QuantizedRows weights(GGML_TYPE_Q4_K, 256, 768, 3);
    const std::vector<float> x = random_values(11 * 768, 4);
    const std::vector<int32_t> ids = choose_experts(c);
    using Tile = RepackedTile<RepackedQ4K, 1, 3, 2, 4, true>;
    const auto result = [&](Order order) {
        return run_gated<Tile>(GGML_TYPE_Q4_K, c, weights.bytes, x, ids, order);
    };
    const GatedRun expected = result(Order::forward);
    for (const emulation::Mutation& mutation : emulation::mutations_of([&] { result(Order::forward); })) {
        if (mutation.file == "expert_slots.cuh") continue;  // seen by expert_matmul_test.cpp
        CAPTURE(mutation.text());
        CHECK_FALSE(emulation::survives(mutation, [&] {
            return std::all_of(std::begin(kOrders), std::end(kOrders),
                               [&](Order order) { return result(order) == expected; });
        }));
    }
}

}  // namespace testing
}  // namespace pydiffusion
