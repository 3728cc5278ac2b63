// The router's kernels on the emulated GPU, against sums in double precision and sorting.
#include "backend/cuda/router_kernels.cuh"

#include "layer_kernels_runs.h"

namespace pydiffusion {
namespace testing {

namespace {

struct Router {
    Router(int32_t d, int32_t n_experts, int32_t n_tokens, int32_t pad = 0)
        : x(matrix_layout(d, n_tokens, d + pad, pad), 1),
          weights(matrix_layout(d, n_experts, d + pad, pad), 2) {}

    // Scores, then the chosen experts.
    std::vector<float> route(int32_t n_used, Order order = Order::random) {
        const int32_t d = x.layout.n, n_experts = weights.layout.n1, n_tokens = x.layout.n1;
        const auto n_scratch = static_cast<int32_t>(router_scratch(d, n_experts, n_tokens));
        Input scratch(matrix_layout(n_scratch, 1, 0), std::vector<float>(n_scratch, NAN));
        Output scores(matrix_layout(n_experts, n_tokens, n_experts + 3));
        std::vector<int32_t> chosen(n_tokens * (n_used + 2), -7);
        const RouterArguments a = {x.data(),         weights.data(),
                                   x.layout.stride1, weights.layout.stride1,
                                   scratch.data(),   scores.floats(),
                                   chosen.data(),    n_experts + 3,
                                   n_used + 2,       d,
                                   n_experts,        n_used,
                                   n_tokens};
        REQUIRE(can_route(a));
        launch_router(a, router_shared_bytes(0), launch_in(order));
        CHECK(scores.has_gaps());
        std::vector<float> all = scores.packed();
        for (int32_t t = 0; t < n_tokens; ++t) {
            const auto begin = chosen.begin() + t * (n_used + 2);
            CHECK(std::vector<int32_t>(begin + n_used, begin + n_used + 2) == std::vector<int32_t>(2, -7));
            const std::vector<int32_t> best = exact_top_k(all.data() + t * n_experts, n_experts, n_used);
            CHECK(std::vector<int32_t>(begin, begin + n_used) == best);
            all.insert(all.end(), begin, begin + n_used);
        }
        return all;
    }

    // Of one score: the exact value, and the size of its terms.
    Exact exact(int32_t token, int32_t expert) const {
        const int32_t d = x.layout.n;
        Exact sum = {0.0, 0.0};
        for (int32_t i = 0; i < d; ++i) {
            const double term = static_cast<double>(x.row(token)[i]) * weights.row(expert)[i];
            sum.value += term;
            sum.size += std::fabs(term);
        }
        return sum;
    }
    void check(const std::vector<float>& found) const {
        const int32_t n_experts = weights.layout.n1;
        for (int32_t token = 0; token < x.layout.n1; ++token) {
            for (int32_t expert = 0; expert < n_experts; ++expert) {
                const float score = found[token * n_experts + expert];
                const Exact expected = exact(token, expert);
                if (is_close(score, expected, FloatType::f32)) continue;
                FAIL_CHECK("token ", token, ", expert ", expert, ": ", score, " instead of ", expected.value);
                return;
            }
        }
    }

    Input x, weights;
};

}  // namespace

TEST_CASE("router: every length of rows") {
    for (const int32_t d : {4, 44, 172, 176, 180, 400, 2816, 6000}) {
        if (kDetectsRaces && d != 180) continue;
        CAPTURE(d);
        Router router(d, 20, 5, d % 8);
        router.check(router.route(8));
    }
}

TEST_CASE("router: every number of experts, tokens and choices") {
    for (const int32_t n_experts : {1, 2, 8, 63, 64, 65, 128, 129, 256}) {
        if (kDetectsRaces && n_experts != 129) continue;
        for (const int32_t n_tokens : {1, 9, 64, 65}) {
            if (n_tokens > 9 && n_experts != 129 && n_experts != 64) continue;
            CAPTURE(n_experts);
            CAPTURE(n_tokens);
            Router router(180, n_experts, n_tokens);
            router.check(router.route(std::min(n_experts, n_tokens == 1 ? n_experts : 8)));
        }
    }
}

TEST_CASE("router: the same bits in any order, at any stride, and beside any tokens") {
    constexpr int32_t d = 1000, n_experts = 70, n_tokens = 66, n_used = 3;
    Router router(d, n_experts, n_tokens);
    const std::vector<float> expected = router.route(n_used);
    for (const Order order : kOrders) {
        if (!kDetectsRaces) CHECK(same(router.route(n_used, order), expected));
    }
    Router wide(d, n_experts, n_tokens, 4);
    CHECK(same(wide.route(n_used), expected));
    for (const int32_t token : {0, 65}) {
        Router one(d, n_experts, 1);
        std::copy_n(router.x.row(token), d, one.x.values.begin());
        const std::vector<float> found = one.route(n_used);
        CHECK(std::equal(found.begin(), found.begin() + n_experts, expected.begin() + token * n_experts));
    }
}

TEST_CASE("router: NaN, infinity and zeros stay in their token, and in their expert") {
    constexpr int32_t d = 360, n_experts = 9;
    Router router(d, n_experts, 5);
    router.x.values[d + 7] = NAN;
    router.x.values[2 * d + 8] = kInfinity;
    std::fill_n(router.x.values.begin() + 3 * d, d, 0.0f);
    const std::vector<float> found = router.route(4);
    for (int32_t i = 0; i < 5 * n_experts; ++i) {
        const int32_t token = i / n_experts;
        CHECK(std::isfinite(found[i]) == (token != 1 && token != 2));
        if (token == 3) CHECK(found[i] == 0.0f);
    }
    Router other(d, n_experts, 2);
    other.weights.values[3 * d + 5] = NAN;
    const std::vector<float> scores = other.route(9);
    for (int32_t i = 0; i < 2 * n_experts; ++i) CHECK(std::isnan(scores[i]) == (i % n_experts == 3));
}

TEST_CASE("router: one block on a multiprocessor") {
    CHECK(router_shared_bytes(99 << 10) == kRouterTileBytes);  // of 99 KB
    CHECK(2 * router_shared_bytes(163 << 10) > 163 << 10);
    CHECK(2 * router_shared_bytes(227 << 10) > 228 << 10);
}

TEST_CASE("router: what is left to other kernels") {
    alignas(16) float memory[64] = {};
    RouterArguments a = {memory, memory, 8, 8, memory, memory, reinterpret_cast<int32_t*>(memory),
                         4,      2,      8, 4, 2,      3};
    CHECK(can_route(a));
    const auto refuses = [&](auto change) {
        RouterArguments other = a;
        change(other);
        return !can_route(other);
    };
    CHECK(refuses([](RouterArguments& b) { b.d = 6; }));
    CHECK(refuses([](RouterArguments& b) { b.n_experts = kMaxRouted + 1; }));
    CHECK(refuses([](RouterArguments& b) { b.n_used = 5; }));
    CHECK(refuses([](RouterArguments& b) { b.x_stride = 9; }));
    CHECK(refuses([](RouterArguments& b) { b.x += 1; }));
    CHECK(refuses([](RouterArguments& b) { b.weights += 1; }));
    CHECK(refuses([](RouterArguments& b) { b.weight_stride = 10; }));
}

TEST_CASE("router: every barrier, mask and wait is needed") {
    const auto results = [](Order order) {
        Router router(180, 40, 40);
        router.x.values[170] = 300.0f;  // one thread's to see
        return router.route(6, order);
    };
    check_mutations(results, 4, 7);
}

}  // namespace testing
}  // namespace pydiffusion
