// The kernels that choose experts and end a layer on the emulated GPU, against sorting and sums in double
// precision.
#include "layer_kernels_runs.h"

namespace pydiffusion {
namespace testing {

namespace {

// Rows of scores that are hard in some way.
std::vector<float> awkward_scores(int32_t n) {
    std::vector<float> rows;
    for (int kind = 0; kind < 10; ++kind) {
        std::vector<float> row = random_values(n, 10 + kind, 3.0f);
        for (int32_t i = 0; i < n; ++i) {
            const bool is_odd = row[i] > 0.5f;
            if (kind == 1) row[i] = 1.0f;                              // all alike
            if (kind == 2) row[i] = std::round(row[i]);                // ties
            if (kind == 3 && is_odd) row[i] = NAN;                     // some
            if (kind == 4) row[i] = NAN;                               // all
            if (kind == 5 && i != n / 2) row[i] = i % 2 ? NAN : -NAN;  // all but one
            if (kind == 6) row[i] = is_odd ? -kInfinity : NAN;         // in index order too
            if (kind == 7) row[i] = is_odd ? kInfinity : row[i];
            if (kind == 8) row[i] = is_odd ? 0.0f : -0.0f;
            if (kind == 9) row[i] = -std::fabs(row[i]) * (is_odd ? 1e-42f : 1e38f);  // subnormal, largest
        }
        rows.insert(rows.end(), row.begin(), row.end());
    }
    return rows;
}

}  // namespace

TEST_CASE("top_k_rows: the order of the CPU's, for every number of scores") {
    for (const int32_t n : {1, 2, 8, 31, 33, 100, 128, 129, 1000, 1024}) {
        if (kDetectsRaces && n != 100) continue;
        const std::vector<float> values = awkward_scores(n);
        const auto n_tokens = static_cast<int32_t>(values.size() / n);
        for (const int32_t n_used : {1, 8, 64}) {
            if (n_used > n && n_used != 8) continue;
            const int32_t k = std::min(n, n_used), pad = n_used == 8 ? 3 : 0;
            CAPTURE(n);
            CAPTURE(k);
            Input scores(matrix_layout(n, n_tokens, n + pad, pad), values);
            for (const Order order : kOrders) {
                if (order != Order::random && (kDetectsRaces || n > 128)) continue;
                std::vector<int32_t> chosen(n_tokens * (k + pad), -7);
                launch_top_k_rows({scores.data(), chosen.data(), n + pad, k + pad, n, k, n_tokens},
                                  launch_in(order));
                for (int32_t t = 0; t < n_tokens; ++t) {
                    CAPTURE(t);
                    std::vector<int32_t> expected = exact_top_k(scores.row(t), n, k);
                    expected.resize(k + pad, -7);
                    const auto begin = chosen.begin() + t * (k + pad);
                    CHECK(std::vector<int32_t>(begin, begin + k + pad) == expected);
                }
            }
        }
    }
}

namespace {

// Operands of join_rows.
struct Branches {
    Branches(int32_t d, int32_t n_experts, int32_t n_used, int32_t n_tokens, int32_t i_layout)
        : x(layouts(d, n_tokens, 1)[i_layout], 1),
          dense(layouts(d, n_tokens, 1)[i_layout == 2 ? 2 : 1 - i_layout], 2),
          experts(layouts(d, n_used, n_tokens)[i_layout], 3),
          scores(matrix_layout(n_experts, n_tokens, n_experts + i_layout),
                 random_values(n_experts * n_tokens, 4, 40.0f)),
          expert_scales(random_values(n_experts, 5)),
          norms{random_values(d, 6), random_values(d, 7), random_values(d, 8), random_values(d, 9)} {
        choose(n_used);
    }
    void choose(int32_t n_used) {
        chosen.clear();
        for (int32_t t = 0; t < scores.layout.n1; ++t) {
            const std::vector<int32_t> best = exact_top_k(scores.row(t), scores.layout.n, n_used);
            chosen.insert(chosen.end(), best.begin(), best.end());
        }
    }
    void join(float* out, int64_t out_stride, Order order, const OutputRows& next = {}) {
        launch_join_rows({x.data(),
                          dense.data(),
                          experts.data(),
                          scores.data(),
                          chosen.data(),
                          out,
                          x.layout.stride1,
                          dense.layout.stride1,
                          experts.layout.stride1,
                          experts.layout.stride2,
                          scores.layout.stride1,
                          experts.layout.n1,
                          out_stride,
                          expert_scales.data(),
                          norms[0].data(),
                          norms[1].data(),
                          norms[2].data(),
                          &scale,
                          x.layout.n,
                          scores.layout.n,
                          experts.layout.n1,
                          x.layout.n1,
                          kEps,
                          next,
                          norms[3].data()},
                         launch_in(order));
    }
    Output joined(Order order = Order::random) {
        Output out(x.layout);
        join(out.floats(), x.layout.stride1, order);
        return out;
    }

    Input x, dense, experts, scores;
    std::vector<int32_t> chosen;
    std::vector<float> expert_scales, norms[4];
    float scale = 0.75f;
};

std::vector<Exact> exact_join(const Branches& b, int32_t t) {
    const int32_t d = b.x.layout.n, n_used = b.experts.layout.n1;
    const float* score = b.scores.row(t);
    const int32_t* chosen = &b.chosen[t * n_used];
    double total = 0.0;
    for (int32_t e = 0; e < b.scores.layout.n; ++e) total += score[e] - score[e];
    std::vector<double> weights, mixture(d), mixture_size(d), sum(d), sum_size(d);
    for (int32_t i = 0; i < n_used; ++i) {
        weights.push_back(std::exp((double{score[chosen[i]]} - score[chosen[0]]) / std::sqrt(d)));
        total += weights.back();
    }
    for (int32_t i = 0; i < n_used; ++i) {
        const float* expert = b.experts.row(t * n_used + i);
        for (int32_t c = 0; c < d; ++c) {
            const double term = weights[i] / total * b.expert_scales[chosen[i]] * expert[c];
            mixture[c] += term;
            mixture_size[c] += std::fabs(term);
        }
    }
    const double dense_scale = exact_scale(b.dense.row(t), d);
    const double mixture_scale = exact_scale(mixture.data(), d);
    for (int32_t c = 0; c < d; ++c) {
        const double dense = b.dense.row(t)[c] * dense_scale * b.norms[0][c];
        sum[c] = dense + mixture[c] * mixture_scale * b.norms[1][c];
        sum_size[c] = std::fabs(dense) + mixture_size[c] * mixture_scale * std::fabs(b.norms[1][c]);
    }
    const double scale = exact_scale(sum.data(), d);
    std::vector<Exact> exact;
    for (int32_t c = 0; c < d; ++c) {
        const double x = b.x.row(t)[c], norm = scale * b.norms[2][c];
        exact.push_back({(x + sum[c] * norm) * b.scale,
                         (std::fabs(x) + sum_size[c] * std::fabs(norm)) * std::fabs(b.scale)});
    }
    return exact;
}

void check_joined(const Output& out, const Branches& b) {
    std::vector<std::vector<Exact>> exact;
    for (int32_t t = 0; t < b.x.layout.n1; ++t) exact.push_back(exact_join(b, t));
    check_output(out, [&](int32_t row, int32_t i) { return exact[row][i]; });
}

}  // namespace

TEST_CASE("join_rows: every length and layout") {
    for (const int32_t d : {1, 2, 31, 64, 100, 1000, 2816, 4700}) {
        if (kDetectsRaces && d != 100 && d != 4700) continue;
        for (int32_t i_layout = 0; i_layout < 3; ++i_layout) {
            CAPTURE(d);
            CAPTURE(i_layout);
            Branches b(d, i_layout == 0 ? 128 : 9, i_layout == 0 ? 8 : 3, d > 1000 ? 1 : 2, i_layout);
            check_joined(b.joined(), b);
        }
    }
}

TEST_CASE("join_rows: every number of experts") {
    for (const int32_t n_used : {1, 4, 5, 31, 33, 64, kMaxUsed}) {
        if (kDetectsRaces && n_used != 33) continue;
        CAPTURE(n_used);
        Branches b(60, n_used + 4, n_used, 2, 0);
        check_joined(b.joined(), b);
    }
}

TEST_CASE("join_rows: the same bits in any order and grid, at any alignment, and in place") {
    for (const int32_t d : {100, 2816, 4700}) {
        if (kDetectsRaces && d != 100) continue;
        CAPTURE(d);
        Branches b(d, 20, 4, 2, 0);
        const std::vector<float> expected = b.joined().packed();
        for (const Order order : kOrders) CHECK(same(b.joined(order).packed(), expected));
        Branches odd(d, 20, 4, 2, 2);
        CHECK(same(odd.joined().packed(), expected));
        for (int32_t operand = 0; operand < 4; ++operand) {
            CAPTURE(operand);
            Branches one_odd = b;
            if (operand == 0) one_odd.x = odd.x;
            if (operand == 1) one_odd.dense = odd.dense;
            if (operand == 2) one_odd.experts = odd.experts;
            Output out(operand == 3 ? odd.x.layout : b.x.layout);
            one_odd.join(out.floats(), out.layout.stride1, Order::random);
            CHECK(same(out.packed(), expected));
        }
        Branches first(d, 20, 4, 1, 0);
        first.chosen = b.chosen;
        first.scores = b.scores;
        CHECK(same(first.joined().packed(), std::vector<float>(expected.begin(), expected.begin() + d)));
        Branches in_dense = b;
        in_dense.join(in_dense.dense.data(), in_dense.dense.layout.stride1, Order::random);
        for (int32_t t = 0; t < 2; ++t)
            CHECK(std::equal(in_dense.dense.row(t), in_dense.dense.row(t) + d, expected.begin() + t * d));
        b.join(b.x.data(), b.x.layout.stride1, Order::random);
        CHECK(same(b.x.values, expected));
    }
}

TEST_CASE("join_rows: the next layer's norm, as norm_rows computes it") {
    int32_t i_layout = 0;
    for (const int32_t d : {31, 100, 2816, 4700}) {
        if (kDetectsRaces && d != 4700) continue;
        CAPTURE(d);
        Branches b(d, 20, 4, 2, i_layout % 3);
        const Output expected = b.joined();
        for (const FloatType type : {FloatType::f32, FloatType::bf16}) {
            Output out(b.x.layout), next(layouts(d, 2, 1)[++i_layout % 3], type), normed(b.x.layout, type);
            b.join(out.floats(), out.layout.stride1, Order::random, next.rows());
            CHECK(same(out.packed(), expected.packed()));
            Input x(b.x.layout, out.packed());
            launch_norm_rows({x.rows(), normed.rows(), b.norms[3].data(), d, 2, 2, kEps},
                             launch_in(Order::random));
            CHECK(next.has_gaps());
            if (d > kMaxWarpRow) CHECK(same(next.packed(), normed.packed()));
            check_output(next, [&](int32_t row, int32_t i) {
                const double value = x.row(row)[i] * exact_scale(x.row(row), d) * b.norms[3][i];
                return Exact{value, std::fabs(value)};
            });
        }
    }
}

TEST_CASE("join_rows: a score that is not finite, of any expert, makes its token NaN, and no other") {
    for (const float value : {NAN, kInfinity, -kInfinity}) {
        Branches b(40, 70, 3, 3, 0);
        b.scores.values[70 + 69] = value;
        b.choose(3);
        const std::vector<float> found = b.joined().packed();
        for (int32_t i = 0; i < 3 * 40; ++i) CHECK(std::isnan(found[i]) == (i / 40 == 1));
    }
}

TEST_CASE("join_rows: NaN and infinity of each operand stay in their token") {
    for (int kind = 0; kind < 4; ++kind) {
        CAPTURE(kind);
        Branches b(40, 10, 3, 3, 0);
        if (kind == 0) b.x.values[40 + 5] = NAN;
        if (kind == 1) b.dense.values[b.dense.layout.begin(1) + 5] = kInfinity;
        if (kind == 2) b.experts.values[b.experts.layout.begin(3 + 2) + 39] = NAN;
        if (kind == 3) std::fill_n(b.experts.values.begin() + b.experts.layout.begin(3), 3 * 40, 0.0f);
        check_joined(b.joined(), b);
    }
}

TEST_CASE("kernels of experts: every barrier and every mask is needed") {
    const auto results = [](Order order) {
        Branches b(600, 40, 6, 1, 0);
        b.dense.values[b.dense.layout.offset + 70] = b.experts.values[300] = 300.0f;  // one thread's to see
        Output out(b.x.layout), next(b.x.layout);
        b.x.values[b.x.layout.offset + 100] = 1000.0f;
        b.join(out.floats(), out.layout.stride1, order, next.rows());
        std::vector<float> all = out.packed();
        const std::vector<float> normed = next.packed();
        all.insert(all.end(), normed.begin(), normed.end());
        std::vector<int32_t> chosen(6);
        launch_top_k_rows({b.scores.data(), chosen.data(), 40, 6, 40, 6, 1}, launch_in(order));
        all.insert(all.end(), chosen.begin(), chosen.end());
        return all;
    };
    check_mutations(results, 3, 7);
}

}  // namespace testing
}  // namespace pydiffusion
