// The kernels of expert matmuls on the emulated GPU, against ggml's dequantized weights in double precision.
#include <algorithm>
#include <cmath>
#include <limits>

#include "backend/cuda/expert_matmul_kernels.cuh"
#include "cuda_emulation/emulate.h"
#include "expert_cases.h"
#include "packed_rows.h"
#include "quantized.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

using namespace cuda;
using emulation::emulate;
using emulation::kOrders;
using emulation::Order;

// [slot][row]; NaN where nothing was written
template <typename Format, typename T>
std::vector<float> run(const ExpertCase& c, const std::vector<uint8_t>& weights, const std::vector<float>& x,
                       const std::vector<int32_t>& ids, Order order) {
    const DeviceMemory w(weights.size()), half(static_cast<size_t>(c.n_x()) * c.n_chunks() * kXChunkBytes);
    std::copy(weights.begin(), weights.end(), w.data.get());
    const auto row_bytes = static_cast<int32_t>(weights.size() / (c.n_experts * c.n_rows));
    std::vector<float> x_scale(c.n_x()), y(static_cast<size_t>(c.n_slots()) * c.n_rows, NAN);
    std::vector<int32_t> slots(c.n_slots()), n_tiles(1);
    const Launch launch = launch_of<T>(c.n_rows, c.n_chunks(), c.n_experts, c.n_slots());
    std::vector<SlotTile> tiles(launch.n_tiles);
    emulate(dim3(c.n_x()), kPackThreads, 0, order, [&] {
        pack_rows<PackOrder::quads>(PlainRows{x.data(), c.n_values}, c.n_values, c.n_chunks(),
                                    half.data.get(), x_scale.data());
    });
    emulate(dim3(1), kGroupThreads, 0, order, [&] {
        group_slots(ids.data(), c.n_used, c.n_used, c.n_tokens, c.n_experts, T::kSlots, slots.data(),
                    tiles.data(), n_tiles.data());
    });
    CHECK(n_tiles[0] <= static_cast<int32_t>(tiles.size()));
    const MatmulArguments arguments = {w.data.get(),
                                       static_cast<int64_t>(weights.size()),
                                       int64_t{row_bytes} * c.n_rows,
                                       row_bytes,
                                       c.n_rows,
                                       c.n_values,
                                       c.n_chunks(),
                                       static_cast<int32_t>(launch.n_row_tiles),
                                       half.data.get(),
                                       x_scale.data(),
                                       y.data(),
                                       slots.data(),
                                       tiles.data(),
                                       n_tiles.data(),
                                       c.per_token ? c.n_used : 1};
    const dim3 grid(static_cast<unsigned>(launch.n_row_blocks), static_cast<unsigned>(launch.n_tiles));
    emulate(grid, T::kThreads, T::kSharedBytes, order, [&] { expert_matmul<Format, T>(arguments); });
    return y;
}

template <typename Format, typename T>
void check_case(ggml_type type, const ExpertCase& c) {
    CAPTURE(ggml_type_name(type));
    CAPTURE(c.n_rows);
    CAPTURE(c.n_values);
    const QuantizedRows weights(type, int64_t{c.n_experts} * c.n_rows, c.n_values, 1);
    const std::vector<float> x = activations(c);
    const std::vector<int32_t> ids = choose_experts(c);
    const std::vector<float> y = run<Format, T>(c, weights.bytes, x, ids, Order::forward);
    for (const Order order : kOrders) {
        const std::vector<float> other = run<Format, T>(c, weights.bytes, x, ids, order);
        CHECK(std::equal(y.begin(), y.end(), other.begin()));
    }
    CHECK(worst_error(c, weights, x, ids, y) < 0x1p-11);  // x is rounded to 11 bits, and nothing else
}

}  // namespace

TEST_CASE("expert matmul: every format at awkward shapes") {
    // Rows that don't fill a tile, experts with no, few and many slots, an odd number of chunks.
    check_case<Q4K, Tile<Q4K, 2, 2, 2, 2>>(GGML_TYPE_Q4_K, {5, 72, 512, 13, 2, true});
    check_case<Q4K, Tile<Q4K, 2, 1, 3, 3>>(GGML_TYPE_Q4_K, {3, 40, 768, 11, 2, false});
    check_case<Q6K, Tile<Q6K, 2, 1, 2, 2>>(GGML_TYPE_Q6_K, {3, 40, 768, 9, 2, false});
    check_case<Q6K, Tile<Q6K, 1, 2, 3, 2>>(GGML_TYPE_Q6_K, {1, 33, 256, 30, 1, true});
    check_case<Q80, Tile<Q80, 2, 1, 2, 3>>(GGML_TYPE_Q8_0, {4, 37, 352, 9, 3, true});
    check_case<Q80, Tile<Q80, 2, 2, 3, 2>>(GGML_TYPE_Q8_0, {2, 64, 32, 20, 1, false});
}

TEST_CASE("expert matmul: a slot's result depends neither on its tile nor on other slots") {
    const ExpertCase few = {2, 24, 512, 9, 1, true};
    const QuantizedRows weights(GGML_TYPE_Q4_K, 2 * 24, 512, 3);
    const std::vector<float> x = random_values(9 * 512, 4);
    const std::vector<int32_t> ids(9, 1);
    const auto together = run<Q4K, Tile<Q4K, 2, 1, 2, 2>>(few, weights.bytes, x, ids, Order::forward);
    const auto other_tile = run<Q4K, Tile<Q4K, 1, 2, 1, 2>>(few, weights.bytes, x, ids, Order::forward);
    CHECK(together == other_tile);
    const std::vector<float> last(x.end() - 512, x.end());
    const auto alone =
        run<Q4K, Tile<Q4K, 2, 1, 2, 2>>({2, 24, 512, 1, 1, true}, weights.bytes, last, {1}, Order::forward);
    CHECK(std::equal(alone.begin(), alone.end(), together.end() - 24));
}

TEST_CASE("expert matmul: NaN and infinity stay in their slot, zeros give zeros, a wrong id gives nothing") {
    const ExpertCase c = {2, 16, 256, 5, 1, true};
    const QuantizedRows weights(GGML_TYPE_Q6_K, 2 * 16, 256, 3);
    std::vector<float> x = random_values(5 * 256, 4);
    x[7] = NAN;
    x[256 + 9] = std::numeric_limits<float>::infinity();
    std::fill_n(x.begin() + 2 * 256, 256, 0.0f);
    const auto y = run<Q6K, Tile<Q6K, 1, 1, 2, 2>>(c, weights.bytes, x, {0, 0, 0, 0, 7}, Order::forward);
    for (int row = 0; row < 16; ++row) {
        CHECK(std::isnan(y[row]));
        CHECK_FALSE(std::isfinite(y[16 + row]));
        CHECK(y[2 * 16 + row] == 0.0f);
        CHECK(std::isfinite(y[3 * 16 + row]));
        CHECK(std::isnan(y[4 * 16 + row]));  // as it was
    }
}

TEST_CASE("expert matmul: an infinite scale stays in its row, though a chunk reads the next rows") {
    const ExpertCase c = {1, 6, 96, 9, 1, true};
    QuantizedRows weights(GGML_TYPE_Q8_0, 6, 96, 3);
    const uint16_t infinity = 0x7c00;
    std::memcpy(weights.bytes.data() + 3 * weights.row_bytes, &infinity, 2);
    const auto y = run<Q80, Tile<Q80, 1, 1, 2, 2>>(c, weights.bytes, random_values(9 * 96, 4),
                                                   std::vector<int32_t>(9, 0), Order::forward);
    for (int i = 0; i < 9 * 6; ++i) CHECK(std::isfinite(y[i]) == (i % 6 != 3));
}

namespace {

template <PackOrder pack_order = PackOrder::quads, typename Rows>
std::vector<PackedRow> packed(const Rows& rows, int32_t n_rows, int32_t n_values, Order order) {
    const int32_t n_chunks = (n_values + kChunk - 1) / kChunk;
    const DeviceMemory half(static_cast<size_t>(n_rows) * n_chunks * kXChunkBytes);
    std::vector<float> scales(n_rows);
    emulate(dim3(n_rows), kPackThreads, 0, order,
            [&] { pack_rows<pack_order>(rows, n_values, n_chunks, half.data.get(), scales.data()); });
    return unpacked(pack_order, half.data.get(), scales.data(), n_rows, n_chunks);
}

// Whether each value is the expected one rounded to 11 bits of the row's largest, but for the float's own
// error.
void check_packed(const std::vector<PackedRow>& found, const std::vector<std::vector<double>>& expected) {
    for (size_t r = 0; r < expected.size(); ++r) {
        double largest = 0.0;
        for (const double value : expected[r]) largest = std::max(largest, std::fabs(value));
        for (size_t i = 0; i < found[r].values.size(); ++i) {
            const double value = i < expected[r].size() ? expected[r][i] : 0.0;
            const double bound = std::fabs(value) * (0x1p-11 + 1e-5) + largest * 0x1p-35;
            if (!(std::fabs(found[r].values[i] - value) <= bound)) FAIL_CHECK("row ", r, ", value ", i);
        }
        for (size_t i = 0; i < found[r].sums.size(); ++i) {
            if (!is_sum_right(found[r], i, largest * 0x1p-34)) FAIL_CHECK("row ", r, ", sum ", i);
        }
    }
}

}  // namespace

TEST_CASE("packed activations: norms and gated GELUs as they are packed") {
    for (const int32_t n : {32, 255, 704, 2816}) {
        CAPTURE(n);
        const int32_t stride = n + 5;
        const std::vector<float> x = random_values(3 * static_cast<size_t>(stride), 1, 4.0f),
                                 y = random_values(3 * static_cast<size_t>(stride), 2, 2.0f),
                                 weight = random_values(n, 3);
        std::vector<std::vector<double>> plain(3), normed(3), gated(3);
        for (int r = 0; r < 3; ++r) {
            double squares = 0.0;
            for (int i = 0; i < n; ++i) squares += static_cast<double>(x[r * stride + i]) * x[r * stride + i];
            for (int i = 0; i < n; ++i) {
                const double value = x[r * stride + i];
                plain[r].push_back(value);
                normed[r].push_back(value / std::sqrt(squares / n + 1e-6) * weight[i]);
                const double inner =
                    std::sqrt(2 / 3.14159265358979323846) * (value + 0.044715 * value * value * value);
                gated[r].push_back(value / 2 * (1 + std::tanh(inner)) * y[r * stride + i]);
            }
        }
        for (const Order order : kOrders) {
            check_packed(packed(PlainRows{x.data(), stride}, 3, n, order), plain);
            check_packed(packed<PackOrder::even_odd>(PlainRows{x.data(), stride}, 3, n, order), plain);
            check_packed(packed(NormedRows{x.data(), stride, weight.data(), 1e-6f}, 3, n, order), normed);
            check_packed(packed(GatedRows{x.data(), y.data(), stride, stride}, 3, n, order), gated);
        }
    }
}

TEST_CASE("packed activations: every barrier and every mask is needed") {
    const int32_t n = 700;
    std::vector<float> x = random_values(2 * n, 1), weight = random_values(n, 2);
    x[333] = 50.0f;
    const auto result = [&](Order order) {
        std::vector<double> all;
        for (const PackedRow& row : packed(NormedRows{x.data(), n, weight.data(), 1e-6f}, 2, n, order)) {
            all.insert(all.end(), row.values.begin(), row.values.end());
            all.insert(all.end(), row.sums.begin(), row.sums.end());
        }
        return all;
    };
    const std::vector<double> expected = result(Order::forward);
    for (const emulation::Mutation& mutation : emulation::mutations_of([&] { result(Order::forward); })) {
        CAPTURE(mutation.text());
        CHECK_FALSE(emulation::survives(mutation, [&] {
            return std::all_of(std::begin(kOrders), std::end(kOrders),
                               [&](Order order) { return result(order) == expected; });
        }));
    }
}

TEST_CASE("expert matmul: every barrier and every mask is needed") {
    const ExpertCase c = {3, 72, 512, 12, 2, true};
    const QuantizedRows weights(GGML_TYPE_Q4_K, 3 * 72, 512, 3);
    std::vector<float> x = random_values(12 * 512, 4);
    for (int token = 0; token < 12; ++token)
        x[token * 512 + 70 * token % 512] = 1000.0f;  // one thread's to see
    const std::vector<int32_t> ids = choose_experts(c);
    const auto result = [&](Order order) {
        return run<Q4K, Tile<Q4K, 2, 1, 2, 2>>(c, weights.bytes, x, ids, order);
    };
    const std::vector<float> expected = result(Order::forward);
    for (const emulation::Mutation& mutation : emulation::mutations_of([&] { result(Order::forward); })) {
        if (mutation.file == "expert_slots.cuh") continue;  // with few experts, one warp sums them
        CAPTURE(mutation.text());
        CHECK_FALSE(emulation::survives(mutation, [&] {
            return std::all_of(std::begin(kOrders), std::end(kOrders),
                               [&](Order order) { return result(order) == expected; });
        }));
    }
}

}  // namespace testing
}  // namespace pydiffusion
