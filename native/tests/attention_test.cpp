// Attention on the emulated GPU against softmax in double precision.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "backend/cuda/attention_kernels.cuh"
#include "cuda_emulation/emulate.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

using namespace cuda;
using emulation::emulate;
using emulation::kOrders;
using emulation::Order;

struct AttentionCase {
    int n_tokens, n_heads, n_kv_heads, n_rows;
    int own_row, window;  // window 0: every token sees every row
    int n_splits;
    FloatType type = FloatType::f32;
};

struct AttentionInputs {
    std::vector<float> q;        // [token][head][dim]
    std::vector<uint16_t> k, v;  // [row][KV head][dim], and hidden rows of NaN
};

AttentionInputs inputs_of(const AttentionCase& c, int n_dims) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    AttentionInputs in;
    in.q.resize(static_cast<size_t>(c.n_tokens) * c.n_heads * n_dims);
    for (float& x : in.q) x = normal(random) * 2.0f / std::sqrt(static_cast<float>(n_dims));
    for (std::vector<uint16_t>* rows : {&in.k, &in.v}) {
        const size_t n = static_cast<size_t>(c.n_rows) * c.n_kv_heads * n_dims;
        rows->assign(n + static_cast<size_t>(3) * c.n_kv_heads * n_dims, 0x7fff);
        for (size_t i = 0; i < n; ++i) (*rows)[i] = emulation::half_from(normal(random));
    }
    return in;
}

// [token][head][dim]
std::vector<double> reference(const AttentionCase& c, const AttentionInputs& in, int n_dims) {
    std::vector<double> out(in.q.size());
    for (int token = 0; token < c.n_tokens; ++token) {
        const int first = c.window ? std::max(0, c.own_row + token - c.window + 1) : 0;
        const int end = c.window ? std::min(c.n_rows, c.own_row + token + 1) : c.n_rows;
        for (int head = 0; head < c.n_heads; ++head) {
            const size_t begin = (static_cast<size_t>(token) * c.n_heads + head) * n_dims;
            const auto row_at = [&](int row) {
                return (static_cast<size_t>(row) * c.n_kv_heads + head / (c.n_heads / c.n_kv_heads)) * n_dims;
            };
            std::vector<double> scores;
            for (int row = first; row < end; ++row) {
                double score = 0;
                for (int i = 0; i < n_dims; ++i)
                    score += emulation::half_to_float(emulation::half_from(in.q[begin + i])) *
                             static_cast<double>(emulation::half_to_float(in.k[row_at(row) + i]));
                scores.push_back(score);
            }
            const double top = *std::max_element(scores.begin(), scores.end());
            double sum = 0;
            for (double& score : scores) sum += score = std::exp(score - top);
            for (int row = first; row < end; ++row) {
                for (int i = 0; i < n_dims; ++i)
                    out[begin + i] +=
                        scores[row - first] / sum * emulation::half_to_float(in.v[row_at(row) + i]);
            }
        }
    }
    return out;
}

// As float32; NaN where nothing was written.
template <typename T>
std::vector<float> run(const AttentionCase& c, const AttentionInputs& in, Order order) {
    const int group = c.n_heads / c.n_kv_heads, n_tiles = (c.n_tokens * group + T::kRows - 1) / T::kRows;
    const int64_t n_parts = int64_t{2} * c.n_splits * c.n_kv_heads * n_tiles;
    std::vector<uint4> partial(static_cast<size_t>(n_parts) * 16 * kWarpgroupThreads);
    std::vector<float2> sums(static_cast<size_t>(n_parts) * kAttentionRows);
    std::vector<uint32_t> words(in.q.size(), 0xffffffffu);
    const auto map = [&](const std::vector<uint16_t>& rows) {
        return TensorMap{reinterpret_cast<const unsigned char*>(rows.data()),
                         int64_t{c.n_kv_heads} * T::kDims * 2, c.n_rows, T::kKeys, T::kChunks};
    };
    AttentionArguments a = {};
    a.k = map(in.k);
    a.v = map(in.v);
    a.q = in.q.data();
    a.q_head = T::kDims;
    a.q_token = a.out_token = int64_t{c.n_heads} * T::kDims;
    a.n_tokens = c.n_tokens;
    a.group = group;
    a.n_rows = c.n_rows;
    a.own_row = c.own_row;
    a.window = c.window;
    a.n_splits = c.n_splits;
    a.out = words.data();
    a.type = c.type;
    a.partial = partial.data();
    a.sums = sums.data();
    emulate(dim3(n_tiles, c.n_splits, c.n_kv_heads), kAttentionThreads, T::kSharedBytes, order,
            [&] { attend_rows<T>(a); });
    if (c.n_splits > 1) {
        emulate(dim3(n_tiles * kMergeBlocks, c.n_kv_heads), kMergeThreads, 0, order,
                [&] { merge_attention<T, 2>(a); });
    }
    std::vector<float> out(in.q.size());
    for (size_t i = 0; i < out.size(); ++i) {
        uint32_t bits = words[i];
        if (c.type == FloatType::bf16) bits = (words[i / 2] >> (i % 2 * 16) & 0xffff) << 16;
        std::memcpy(&out[i], &bits, sizeof bits);
    }
    return out;
}

template <typename T>
void check_case(const AttentionCase& c) {
    CAPTURE(c.n_tokens);
    CAPTURE(c.n_rows);
    CAPTURE(c.window);
    CAPTURE(c.n_splits);
    const AttentionInputs in = inputs_of(c, T::kDims);
    const std::vector<double> want = reference(c, in, T::kDims);
    const std::vector<float> got = run<T>(c, in, Order::forward);
    double worst = 0;
    for (size_t i = 0; i < got.size(); ++i) {
        const double error = std::fabs(got[i] - want[i]);
        worst = error <= worst ? worst : error;
    }
    CHECK(worst < (c.type == FloatType::bf16 ? 0x1p-7 : 0x1p-9));
    for (const Order order : {Order::backward, Order::random}) CHECK(run<T>(c, in, order) == got);
}

using Tile256 = AttentionTile<256, 80, 2>;
using Tile512 = AttentionTile<512, 64, 1>;

}  // namespace

TEST_CASE("attention to all rows") {
    check_case<Tile256>({70, 2, 1, 200, 0, 0, 1});
    check_case<Tile256>({5, 4, 2, 389, 0, 0, 3, FloatType::bf16});
    check_case<Tile256>({3, 2, 2, 7, 0, 0, 2});
    check_case<Tile512>({20, 8, 2, 200, 0, 0, 1, FloatType::bf16});
    check_case<Tile512>({5, 4, 1, 389, 0, 0, 3});
    check_case<AttentionTile<512, 32, 2>>({5, 4, 1, 389, 0, 0, 5});  // and other tiles
}

TEST_CASE("causal attention") {
    check_case<Tile256>({130, 2, 1, 150, 20, 1 << 30, 1});
    check_case<Tile256>({130, 2, 1, 330, 200, 40, 2});
    check_case<Tile512>({40, 4, 1, 240, 200, 100, 1});
}

TEST_CASE("attention: NaN and infinity spread to what they are part of") {
    const AttentionCase c = {3, 2, 1, 100, 0, 0, 2};
    const auto n_bad = [&](const AttentionInputs& in, int dim) {  // dim -1: of all
        const std::vector<float> out = run<Tile256>(c, in, Order::forward);
        int n = 0;
        for (size_t i = 0; i < out.size(); ++i)
            n += !std::isfinite(out[i]) && (dim < 0 || i % 256 == static_cast<size_t>(dim));
        return n;
    };
    const AttentionInputs sound = inputs_of(c, 256);
    AttentionInputs in = sound;
    in.k[50 * 256 + 3] = 0x7fff;
    CHECK(n_bad(in, -1) == 6 * 256);
    in = sound;
    in.q[256 + 7] = NAN;
    CHECK(n_bad(in, -1) == 256);
    in.q[256 + 7] = INFINITY;
    CHECK(n_bad(in, -1) == 256);
    // Every score of this head is -infinity.
    AttentionCase one = c;
    for (one.n_splits = 1; one.n_splits <= 2; ++one.n_splits) {
        in = sound;
        in.q[0] = INFINITY;
        for (int row = 0; row < one.n_rows; ++row) in.k[static_cast<size_t>(row) * 256] = 0xbc00;
        const std::vector<float> out = run<Tile256>(one, in, Order::forward);
        CHECK(std::all_of(out.begin(), out.begin() + 256, [](float x) { return std::isnan(x); }));
        CHECK(std::all_of(out.begin() + 256, out.end(), [](float x) { return std::isfinite(x); }));
    }
    for (const uint16_t value : {0x7fff, 0x7c00}) {
        in = sound;
        in.v[99 * 256 + 3] = value;
        CHECK(n_bad(in, -1) == 6);
        CHECK(n_bad(in, 3) == 6);
    }
}

TEST_CASE("attention: every barrier is needed") {
    const AttentionCase c = {5, 2, 1, 200, 0, 0, 2};
    const auto check = [&](auto tile) {
        using Tile = decltype(tile);
        const AttentionInputs in = inputs_of(c, Tile::kDims);
        const std::vector<float> expected = run<Tile>(c, in, Order::forward);
        for (const emulation::Mutation& mutation :
             emulation::mutations_of([&] { run<Tile>(c, in, Order::forward); })) {
            CAPTURE(mutation.text());
            CHECK_FALSE(emulation::survives(mutation, [&] {
                return std::all_of(std::begin(kOrders), std::end(kOrders),
                                   [&](Order order) { return run<Tile>(c, in, order) == expected; });
            }));
        }
    };
    check(AttentionTile<256, 32, 2>());
    check(AttentionTile<512, 32, 1>());
}

}  // namespace testing
}  // namespace pydiffusion
