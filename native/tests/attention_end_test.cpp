// The end of the attention on the emulated GPU: the bits of the kernels whose results it computes in one.
#include "backend/cuda/attention_end.cuh"

#include "expert_cases.h"
#include "layer_kernels_runs.h"

namespace pydiffusion {
namespace testing {

namespace {

struct AttentionEnd {
    AttentionEnd(int32_t d, int32_t n_tokens, int32_t i_layout)
        : x(layouts(d, n_tokens, 1)[i_layout], 1),
          branch(layouts(d, n_tokens, 1)[1 - i_layout], 2),
          weight(random_values(d, 3)),
          dense_norm(random_values(d, 4)),
          router_norm(random_values(d, 6)),
          packed_norm(random_values(d, 5)) {}

    struct Results {
        Output r, dense, router;
        std::vector<unsigned char> packed;  // rows, then their scales
        std::vector<float> all() const {
            std::vector<float> values = r.packed();
            for (const Output* rows : {&dense, &router}) {
                const std::vector<float> more = rows->packed();
                values.insert(values.end(), more.begin(), more.end());
            }
            values.insert(values.end(), packed.begin(), packed.end());
            return values;
        }
    };
    int32_t d() const { return x.layout.n; }
    int32_t n_tokens() const { return x.layout.n1; }
    int32_t n_chunks() const { return (d() + kChunk - 1) / kChunk; }
    size_t row_bytes() const { return static_cast<size_t>(n_chunks()) * kXChunkBytes; }
    AddNormedArguments sum(Output& r) {
        return {x.data(),         branch.data(), r.floats(), x.layout.stride1, branch.layout.stride1,
                r.layout.stride1, weight.data(), d(),        n_tokens(),       kEps};
    }

    Results new_results(FloatType type) const {
        return {Output(x.layout), Output(branch.layout, type), Output(x.layout), {}};
    }

    Results run(FloatType type, PackOrder pack_order, Order order = Order::random, bool packs = true) {
        Results results = new_results(type);
        const DeviceMemory packed(n_tokens() * row_bytes());
        std::vector<float> scales(n_tokens(), NAN);
        const AttentionEndArguments a = {sum(results.r),
                                         dense_norm.data(),
                                         router_norm.data(),
                                         packs ? packed_norm.data() : nullptr,
                                         results.dense.rows(),
                                         results.router.rows(),
                                         packs ? packed.data.get() : nullptr,
                                         scales.data(),
                                         n_chunks()};
        REQUIRE(can_end_attention(a));
        launch_end_attention_rows(a, pack_order, launch_in(order));
        for (const Output* rows : {&results.r, &results.dense, &results.router}) CHECK(rows->has_gaps());
        if (packs) results.packed = bytes_of(packed, scales);
        return results;
    }

    // By a kernel for each.
    Results run_apart(FloatType type, PackOrder pack_order) {
        const auto launch = launch_in(Order::forward);
        Results results = new_results(type);
        launch_add_normed_rows(sum(results.r), launch);
        Input r(x.layout, results.r.packed());
        Output normed(matrix_layout(d(), n_tokens(), d()));
        // In blocks, as rows of more than kMaxWarpRow elements are.
        const auto norm = [&](const OutputRows& out, const std::vector<float>& norm_weight) {
            launch_norm_rows_with<RowOfBlock, true>(
                {r.rows(), out, norm_weight.data(), d(), n_tokens(), n_tokens(), kEps}, launch);
        };
        norm(results.dense.rows(), dense_norm);
        norm(results.router.rows(), router_norm);
        norm(normed.rows(), packed_norm);
        const DeviceMemory packed(n_tokens() * row_bytes());
        std::vector<float> scales(n_tokens());
        const auto pack = pack_order == PackOrder::quads ? pack_rows<PackOrder::quads, PlainRows>
                                                         : pack_rows<PackOrder::even_odd, PlainRows>;
        emulate(n_tokens(), kPackThreads, 0, Order::forward,
                [&] { pack({normed.floats(), d()}, d(), n_chunks(), packed.data.get(), scales.data()); });
        results.packed = bytes_of(packed, scales);
        return results;
    }

    std::vector<unsigned char> bytes_of(const DeviceMemory& packed, const std::vector<float>& scales) const {
        std::vector<unsigned char> bytes(packed.data.get(), packed.data.get() + n_tokens() * row_bytes());
        const auto* begin = reinterpret_cast<const unsigned char*>(scales.data());
        bytes.insert(bytes.end(), begin, begin + scales.size() * sizeof(float));
        return bytes;
    }

    Input x, branch;
    std::vector<float> weight, dense_norm, router_norm, packed_norm;
};

}  // namespace

TEST_CASE("end of the attention: the bits of each kernel, for every length, layout and order of packing") {
    for (const int32_t d : {516, 600, 1024, 2816, 3072}) {
        if (kDetectsRaces && d != 600) continue;
        for (const PackOrder pack_order : {PackOrder::quads, PackOrder::even_odd}) {
            CAPTURE(d);
            const bool is_even = pack_order == PackOrder::even_odd;
            AttentionEnd end(d, 3, is_even);
            const FloatType type = is_even ? FloatType::bf16 : FloatType::f32;
            const AttentionEnd::Results expected = end.run_apart(type, pack_order);
            for (const Order order : kOrders) {
                const AttentionEnd::Results found = end.run(type, pack_order, order);
                CHECK(same(found.r.packed(), expected.r.packed()));
                CHECK(same(found.dense.packed(), expected.dense.packed()));
                CHECK(same(found.router.packed(), expected.router.packed()));
                CHECK(found.packed == expected.packed);
                if (kDetectsRaces) break;
            }
        }
    }
}

TEST_CASE("end of the attention: without packing") {
    AttentionEnd end(520, 2, 0);
    const AttentionEnd::Results packed = end.run(FloatType::bf16, PackOrder::quads);
    const AttentionEnd::Results rows = end.run(FloatType::bf16, PackOrder::quads, Order::random, false);
    CHECK(same(rows.r.packed(), packed.r.packed()));
    CHECK(same(rows.dense.packed(), packed.dense.packed()));
    CHECK(same(rows.router.packed(), packed.router.packed()));
}

TEST_CASE("end of the attention: NaN, infinity and zeros stay in their row") {
    AttentionEnd end(520, 4, 0);
    const AttentionEnd::Results clean = end.run(FloatType::bf16, PackOrder::quads);
    end.x.values[520 + 5] = NAN;
    end.branch.values[end.branch.layout.begin(2) + 6] = kInfinity;
    const AttentionEnd::Results found = end.run(FloatType::bf16, PackOrder::quads);
    for (int32_t row = 0; row < 4; ++row) {
        const bool is_clean = row == 0 || row == 3;
        const auto of_row = [&](const AttentionEnd::Results& results) {
            const auto begin = results.packed.begin() + row * end.row_bytes();
            return std::vector<unsigned char>(begin, begin + end.row_bytes());
        };
        CHECK((of_row(found) == of_row(clean)) == is_clean);
        for (int32_t i = 0; i < 520; ++i) CHECK(std::isnan(found.router.at(row, i)) == !is_clean);
    }
}

TEST_CASE("end of the attention: rows that are too long or not aligned are left to other kernels") {
    AttentionEnd end(520, 1, 0);
    Output r(end.x.layout);
    AttentionEndArguments a = {end.sum(r),
                               end.dense_norm.data(),
                               end.router_norm.data(),
                               end.packed_norm.data(),
                               r.rows(),
                               r.rows(),
                               nullptr,
                               nullptr,
                               3};
    CHECK(can_end_attention(a));
    const auto refuses = [&](auto change) {
        AttentionEndArguments other = a;
        change(other);
        return !can_end_attention(other);
    };
    CHECK(refuses([](AttentionEndArguments& b) { b.sum.d = 518; }));
    CHECK(refuses([](AttentionEndArguments& b) { b.n_chunks = 13; }));
    CHECK(refuses([](AttentionEndArguments& b) { b.sum.x += 1; }));
    CHECK(refuses([](AttentionEndArguments& b) { b.sum.branch_stride += 1; }));
    CHECK(refuses([](AttentionEndArguments& b) { b.sum.out += 2; }));
    CHECK(refuses([](AttentionEndArguments& b) { b.sum.weight = nullptr; }));
    CHECK(refuses([](AttentionEndArguments& b) { b.dense.stride1 += 2; }));
    CHECK(refuses([](AttentionEndArguments& b) { b.router.stride1 += 2; }));
    CHECK(refuses([](AttentionEndArguments& b) { b.router_norm += 1; }));
    CHECK(refuses([](AttentionEndArguments& b) { b.dense_norm += 1; }));
    CHECK(refuses([](AttentionEndArguments& b) { b.packed_norm += 3; }));
}

TEST_CASE("end of the attention: every barrier and every mask is needed") {
    const auto results = [](Order order) {
        AttentionEnd end(600, 1, 0);
        end.branch.values[end.branch.layout.begin(0) + 130] = 300.0f;  // one thread's to see
        end.x.values[500] = 1000.0f;
        return end.run(FloatType::f32, PackOrder::quads, order).all();
    };
    check_mutations(results, 1, 5);
}

}  // namespace testing
}  // namespace pydiffusion
