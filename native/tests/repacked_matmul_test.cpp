// The kernel of expert matmuls of repacked weights on the emulated GPU, against ggml's dequantized weights in
// double precision.
#include <algorithm>
#include <cmath>
#include <limits>

#include "repacked_runs.h"

namespace pydiffusion {
namespace testing {

namespace {

using namespace cuda;
using emulation::kOrders;
using emulation::Order;

// Results are precise, and the same in other orders of threads and with other tiles.
template <typename T, typename Other>
void check_case(ggml_type type, const ExpertCase& c) {
    CAPTURE(ggml_type_name(type));
    CAPTURE(c.n_rows);
    CAPTURE(c.n_values);
    const QuantizedRows weights(type, int64_t{c.n_experts} * c.n_rows, c.n_values, 1);
    const std::vector<float> x = activations(c);
    const std::vector<int32_t> ids = choose_experts(c);
    const std::vector<float> y = run<T>(type, c, weights.bytes, x, ids, Order::forward);
    CHECK(worst_error(c, weights, x, ids, y) < 0x1p-11);  // x is rounded to 11 bits, weights too
    for (const Order order : {Order::backward, Order::random})
        CHECK(run<T>(type, c, weights.bytes, x, ids, order) == y);
    CHECK(run<Other>(type, c, weights.bytes, x, ids, Order::forward) == y);
    CHECK(run<T, true>(type, c, weights.bytes, x, ids, Order::random) == y);
}

// Those of the backend, and others.
using Tile4 = RepackedTile<RepackedQ4K, 2, 3, 2, 4>;
using Tile6 = RepackedTile<RepackedQ6K, 1, 3, 2, 2>;
using Tile8 = RepackedTile<RepackedQ80, 1, 3, 2, 2>;
using Other4 = RepackedTile<RepackedQ4K, 1, 1, 3, 2>;
using Other6 = RepackedTile<RepackedQ6K, 2, 2, 3, 4>;
using Other8 = RepackedTile<RepackedQ80, 2, 1, 3, 4>;

}  // namespace

TEST_CASE("repacked matmul: every format at awkward shapes") {
    // Rows that don't fill a tile, experts with no, few and many slots, one and several chunks, also partial
    // ones.
    check_case<Tile4, Other4>(GGML_TYPE_Q4_K, {3, 64, 768, 9, 2, true});
    check_case<Tile4, Other4>(GGML_TYPE_Q4_K, {2, 320, 256, 10, 1, true});
    check_case<Tile6, Other6>(GGML_TYPE_Q6_K, {2, 128, 512, 7, 1, true});
    check_case<Tile6, Other6>(GGML_TYPE_Q6_K, {1, 64, 256, 25, 1, true});
    check_case<Tile8, Other8>(GGML_TYPE_Q8_0, {3, 64, 704, 3, 2, false});
    check_case<Tile8, Other8>(GGML_TYPE_Q8_0, {2, 64, 32, 18, 1, false});
}

TEST_CASE("repacked matmul: a slot's result does not depend on other slots") {
    const int32_t n = 24;
    const QuantizedRows weights(GGML_TYPE_Q4_K, 64, 512, 3);
    const std::vector<float> x = random_values(n * 512, 4);
    const auto together = run<Tile4>(GGML_TYPE_Q4_K, {1, 64, 512, n, 1, true}, weights.bytes, x,
                                     std::vector<int32_t>(n, 0), Order::forward);
    for (const int32_t some : {1, 7, 8, 9, 15, 16, 17, 23}) {  // the last ones
        const auto apart = run<Tile4>(GGML_TYPE_Q4_K, {1, 64, 512, some, 1, true}, weights.bytes,
                                      std::vector<float>(x.end() - some * 512, x.end()),
                                      std::vector<int32_t>(some, 0), Order::forward);
        CHECK(std::equal(apart.begin(), apart.end(), together.end() - some * 64));
    }
}

TEST_CASE(
    "repacked matmul: NaN and infinity stay in their slot, zeros give zeros, a wrong id gives nothing") {
    const ExpertCase c = {2, 64, 256, 5, 1, true};
    std::vector<float> x = random_values(5 * 256, 4);
    x[7] = NAN;
    x[256 + 9] = std::numeric_limits<float>::infinity();
    std::fill_n(x.begin() + 2 * 256, 256, 0.0f);
    const auto check = [&](const std::vector<float>& y) {
        for (int row = 0; row < 64; ++row) {
            CHECK(std::isnan(y[row]));
            CHECK_FALSE(std::isfinite(y[64 + row]));
            CHECK(y[2 * 64 + row] == 0.0f);
            CHECK(std::isfinite(y[3 * 64 + row]));
            CHECK(std::isnan(y[4 * 64 + row]));  // as it was
        }
    };
    const std::vector<int32_t> ids = {0, 0, 0, 0, 7};
    const auto bytes = [](ggml_type type) { return QuantizedRows(type, 2 * 64, 256, 3).bytes; };
    check(run<Tile4>(GGML_TYPE_Q4_K, c, bytes(GGML_TYPE_Q4_K), x, ids, Order::forward));
    check(run<Tile6>(GGML_TYPE_Q6_K, c, bytes(GGML_TYPE_Q6_K), x, ids, Order::forward));
    check(run<Tile8>(GGML_TYPE_Q8_0, c, bytes(GGML_TYPE_Q8_0), x, ids, Order::forward));
}

TEST_CASE("repacked matmul: an infinite scale stays in its row; large, tiny and absent ones are precise") {
    const ExpertCase c = {1, 64, 96, 9, 1, true};
    QuantizedRows weights(GGML_TYPE_Q8_0, 64, 96, 3);
    const auto set_scales = [&](int row, uint16_t bits) {
        for (int block = 0; block < 3; ++block)
            std::memcpy(weights.bytes.data() + row * weights.row_bytes + 34 * block, &bits, 2);
    };
    set_scales(2, 0x7800);  // 2^15
    set_scales(3, 0x7c00);
    set_scales(4, 0x0001);
    set_scales(5, 0x0000);
    ggml_get_type_traits(weights.type)->to_float(weights.bytes.data(), weights.dequantized.data(), 64 * 96);
    std::vector<float> x = random_values(9 * 96, 4);
    const std::vector<int32_t> ids(9, 0);
    auto y = run<Tile8>(GGML_TYPE_Q8_0, c, weights.bytes, x, ids, Order::forward);
    for (int i = 0; i < 9 * 64; ++i) CHECK(std::isfinite(y[i]) == (i % 64 != 3));
    for (int slot = 0; slot < 9; ++slot) y[slot * 64 + 3] = 0.0f;
    std::fill_n(weights.dequantized.begin() + 3 * 96, 96, 0.0f);
    CHECK(worst_error(c, weights, x, ids, y) < 0x1p-11);
}

TEST_CASE("repacked matmul: every barrier and every mask is needed") {
    // Four chunks use both stages twice. The fences of multiplications are not emulated.
    const ExpertCase c = {1, 128, 1024, 3, 1, true};
    const QuantizedRows weights(GGML_TYPE_Q4_K, 128, 1024, 3);
    const std::vector<float> x = random_values(3 * 1024, 4);
    const std::vector<int32_t> ids = choose_experts(c);
    using Tile = RepackedTile<RepackedQ4K, 1, 3, 2, 4>;
    const auto result = [&](Order order) {
        return run<Tile>(GGML_TYPE_Q4_K, c, weights.bytes, x, ids, order);
    };
    const std::vector<float> expected = result(Order::forward);
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
