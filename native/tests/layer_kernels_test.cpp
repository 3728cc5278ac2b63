// The row-wise kernels of a layer on the emulated GPU, against sums in double precision.
#include "layer_kernels_runs.h"

namespace pydiffusion {
namespace testing {

namespace {

constexpr FloatType kTypes[] = {FloatType::f32, FloatType::f16, FloatType::bf16};

NormArguments norm_arguments(Input& x, const OutputRows& out, const float* weight) {
    return {x.rows(), out, weight, x.layout.n, x.layout.n1, x.layout.n_rows(), kEps};
}

// One norm of x.
Output norm(Input& x, const float* weight, FloatType type, Order order = Order::random) {
    Output out(x.layout, type);
    launch_norm_rows(norm_arguments(x, out.rows(), weight), launch_in(order));
    return out;
}

void check_norm(const Output& out, const Input& x, const float* weight) {
    std::vector<double> scales;
    for (int32_t row = 0; row < x.layout.n_rows(); ++row)
        scales.push_back(exact_scale(x.row(row), x.layout.n));
    check_output(out, [&](int32_t row, int32_t i) {
        const double value = x.row(row)[i] * scales[row] * (weight ? weight[i] : 1.0f);
        return Exact{value, std::fabs(value)};
    });
}

// Lengths of rows: of one thread, of a warp and beyond, of warps and of blocks, in registers and beyond.
std::vector<int32_t> lengths() {
    return kDetectsRaces ? std::vector<int32_t>{31, 600, 4700}
                         : std::vector<int32_t>{1, 2, 31, 33, 64, 100, 512, 513, 1000, 2816, 4700};
}

}  // namespace

TEST_CASE("begins_at_four: the address and every stride count") {
    alignas(16) float x[8];
    CHECK(begins_at_four(InputRows{x + 4, 8, 12}));
    CHECK_FALSE(begins_at_four(InputRows{x + 2, 8, 12}));
    CHECK_FALSE(begins_at_four(InputRows{x, 6, 12}));
    CHECK_FALSE(begins_at_four(InputRows{x, 8, 13}));
    CHECK(begins_at_four(OutputRows{x + 2, 8, 12, FloatType::bf16}));
    CHECK_FALSE(begins_at_four(OutputRows{x + 2, 8, 12, FloatType::f32}));
    CHECK_FALSE(begins_at_four(OutputRows{x + 1, 8, 12, FloatType::f16}));
    CHECK_FALSE(begins_at_four(OutputRows{x, 8, 14, FloatType::bf16}));
    CHECK(begins_at_four(nullptr));
}

TEST_CASE("norm_rows: every length, layout and type") {
    for (const int32_t n : lengths()) {
        const std::vector<float> weight = random_values(n, 2);
        int32_t i_layout = 0;
        for (const Layout& layout : layouts(n, n > 1000 ? 1 : 3, 2)) {
            CAPTURE(n);
            CAPTURE(i_layout);
            Input x(layout, 1);
            const FloatType type = kTypes[i_layout++ % 3];
            check_norm(norm(x, weight.data(), type), x, weight.data());
            check_norm(norm(x, nullptr, FloatType::f32), x, nullptr);
        }
    }
}

TEST_CASE("norm_rows: the same bits in any order and grid, at any alignment, and in place") {
    for (const int32_t n : {64, 100, 2816}) {
        CAPTURE(n);
        const std::vector<float> values = random_values(5 * n, 1), weight = random_values(n, 2);
        std::vector<float> odd_weight(1);
        odd_weight.insert(odd_weight.end(), weight.begin(), weight.end());
        const std::vector<Layout> all = layouts(n, 5, 1);
        Input x(all[0], values);
        const std::vector<float> expected = norm(x, weight.data(), FloatType::f32).packed();
        if (!kDetectsRaces) {
            for (const Order order : kOrders)
                CHECK(same(norm(x, weight.data(), FloatType::f32, order).packed(), expected));
            for (const Layout& layout : all) {
                Input other(layout, values);
                CHECK(same(norm(other, odd_weight.data() + 1, FloatType::f32).packed(), expected));
            }
        }
        Input last(matrix_layout(n, 1, n), std::vector<float>(values.end() - n, values.end()));
        CHECK(same(norm(last, weight.data(), FloatType::f32).packed(),
                   std::vector<float>(expected.end() - n, expected.end())));
        launch_norm_rows(norm_arguments(x, x.in_place(), weight.data()), launch_in(Order::random));
        CHECK(same(x.values, expected));
    }
}

TEST_CASE("norm_rows: NaN, infinity, zeros and squares beyond float's range stay in their row") {
    for (const int32_t n : {100, 1000}) {
        CAPTURE(n);
        std::vector<float> values = random_values(7 * n, 1);
        values[5] = NAN;
        values[n + 6] = -kInfinity;
        std::fill_n(values.begin() + 2 * n, n, 0.0f);
        for (int32_t i = 0; i < n; ++i) {
            values[3 * n + i] *= 1e30f;
            values[4 * n + i] *= 1e-30f;
            values[5 * n + i] *= 1e15f;
        }
        Input x(matrix_layout(n, 7, n), values);
        check_norm(norm(x, nullptr, FloatType::f32), x, nullptr);
        check_norm(norm(x, nullptr, FloatType::bf16), x, nullptr);
    }
}

namespace {

__global__ void round_to_bf16(const float* x, uint16_t* bits) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    bits[i] = bfloat16_of(x[i]).bits;
}

}  // namespace

TEST_CASE("bfloat16_of: ggml's rounding, for every high half and the low halves around a tie") {
    constexpr uint32_t n_highs = 65536;
    std::vector<float> x(n_highs);
    std::vector<uint16_t> bits(n_highs);
    for (const uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
        if (kDetectsRaces && low != 0x8000u) continue;
        for (uint32_t high = 0; high < n_highs; ++high) {
            const uint32_t word = high << 16 | low;
            std::memcpy(&x[high], &word, sizeof word);
        }
        emulate(n_highs / 1024, 1024, 0, Order::forward, [&] { round_to_bf16(x.data(), bits.data()); });
        CHECK(std::equal(bits.begin(), bits.end(), x.begin(),
                         [](uint16_t b, float value) { return b == ggml_fp32_to_bf16(value).bits; }));
    }
}

namespace {

// Cosines and sines of angles, [head_dim, n_tokens].
std::vector<float> angle_values(int32_t head_dim, int32_t n_tokens) {
    std::vector<float> values;
    for (int32_t t = 0; t < n_tokens; ++t) {
        for (int32_t i = 0; i < head_dim; ++i) {
            const double angle = (t + 3.0) * (i % (head_dim / 2) + 1.0);
            values.push_back(static_cast<float>(i < head_dim / 2 ? std::cos(angle) : std::sin(angle)));
        }
    }
    return values;
}

void rotate(Input& x, const OutputRows& out, const float* weight, Input& angles,
            Order order = Order::random) {
    const Layout& l = x.layout;
    launch_rotate_normed_rows(
        {{{x.rows(), out, weight, l.n1, true}}, 1, angles.data(), angles.layout.stride1, l.n, l.n2, kEps},
        launch_in(order));
}

void check_rotated(const Output& out, const Input& x, const float* weight, const Input& angles) {
    const int32_t half = x.layout.n / 2;
    check_output(out, [&](int32_t row, int32_t i) {
        const float *from = x.row(row), *angle = angles.row(row / x.layout.n1);
        const double scale = exact_scale(from, x.layout.n);
        const int32_t pair = i % half;
        const double a = from[pair] * scale * (weight ? weight[pair] : 1.0f);
        const double b = from[half + pair] * scale * (weight ? weight[half + pair] : 1.0f);
        const double cosine = angle[pair], sine = angle[half + pair];
        return i < half ? Exact{a * cosine - b * sine, std::fabs(a * cosine) + std::fabs(b * sine)}
                        : Exact{a * sine + b * cosine, std::fabs(a * sine) + std::fabs(b * cosine)};
    });
}

}  // namespace

TEST_CASE("rotate_normed_rows: heads of every length, layout and type") {
    for (const int32_t head_dim : {2, 6, 16, 64, 100, 256, 512, 1000}) {
        if (kDetectsRaces && head_dim != 100 && head_dim != 1000) continue;
        CAPTURE(head_dim);
        const std::vector<float> weight = random_values(head_dim, 2);
        int32_t i_layout = 0;
        for (const Layout& layout : layouts(head_dim, 3, 2)) {
            CAPTURE(i_layout);
            Input x(layout, 1);
            Input angles(matrix_layout(head_dim, 2, head_dim + i_layout), angle_values(head_dim, 2));
            // The results' layout is another one.
            Output out(layouts(head_dim, 3, 2)[(i_layout + 1) % 3], kTypes[i_layout]);
            rotate(x, out.rows(), weight.data(), angles);
            check_rotated(out, x, weight.data(), angles);
            Output plain(layout);
            rotate(x, plain.rows(), nullptr, angles);
            check_rotated(plain, x, nullptr, angles);
            ++i_layout;
        }
    }
}

TEST_CASE("rotate_normed_rows: three kinds of heads at a time, one of them not rotated") {
    for (const int32_t head_dim : {16, 100, 512, 1000}) {
        if (kDetectsRaces && head_dim != 100) continue;
        CAPTURE(head_dim);
        const std::vector<float> q_weight = random_values(head_dim, 2), k_weight = random_values(head_dim, 3);
        Input angles(matrix_layout(head_dim, 2, head_dim), angle_values(head_dim, 2));
        const int32_t n_heads = head_dim == 512 ? 4 : 11;  // of Q; the last block's are not all there
        Input q(layouts(head_dim, n_heads, 2)[1], 1), k(layouts(head_dim, 2, 2)[0], 4);
        Output q_out(layouts(head_dim, n_heads, 2)[0]), k_out(layouts(head_dim, 2, 2)[0], FloatType::f16),
            v_out(layouts(head_dim, 2, 2)[1], FloatType::f16);
        launch_rotate_normed_rows({{{q.rows(), q_out.rows(), q_weight.data(), n_heads, true},
                                    {k.rows(), k_out.rows(), k_weight.data(), 2, true},
                                    {k.rows(), v_out.rows(), nullptr, 2, false}},
                                   3,
                                   angles.data(),
                                   angles.layout.stride1,
                                   head_dim,
                                   2,
                                   kEps},
                                  launch_in(Order::random));
        check_rotated(q_out, q, q_weight.data(), angles);
        check_rotated(k_out, k, k_weight.data(), angles);
        check_output(v_out, [&](int32_t row, int32_t i) {
            const double value = k.row(row)[i] * exact_scale(k.row(row), head_dim);
            return Exact{value, std::fabs(value)};
        });
    }
}

TEST_CASE("rotate_normed_rows: the same bits in any order, at any alignment, and in place; NaN") {
    for (const int32_t head_dim : {64, 512, 1000}) {
        if (kDetectsRaces && head_dim != 512) continue;
        CAPTURE(head_dim);
        std::vector<float> values = random_values(6 * head_dim, 1);
        const std::vector<float> weight = random_values(head_dim, 2);
        values[2 * head_dim + 7] = NAN;
        Input angles(matrix_layout(head_dim, 2, head_dim), angle_values(head_dim, 2));
        const std::vector<Layout> all = layouts(head_dim, 3, 2);
        Input x(all[0], values), odd(all[2], values);
        Output out(all[0]), odd_out(all[2]);
        rotate(x, out.rows(), weight.data(), angles);
        check_rotated(out, x, weight.data(), angles);
        for (const Order order : kOrders) {
            Output other(all[0]);
            rotate(x, other.rows(), weight.data(), angles, order);
            CHECK(same(other.packed(), out.packed()));
        }
        rotate(odd, odd_out.rows(), weight.data(), angles);
        CHECK(same(odd_out.packed(), out.packed()));
        rotate(x, x.in_place(), weight.data(), angles);
        CHECK(same(x.values, out.packed()));
    }
}

namespace {

void add_normed(Input& x, Input& branch, float* out, int64_t out_stride, const float* weight,
                Order order = Order::random) {
    launch_add_normed_rows({x.data(), branch.data(), out, x.layout.stride1, branch.layout.stride1, out_stride,
                            weight, x.layout.n, x.layout.n1, kEps},
                           launch_in(order));
}

}  // namespace

TEST_CASE("add_normed_rows: every length and layout, in any order, and in place") {
    for (const int32_t d : lengths()) {
        CAPTURE(d);
        const int32_t n_tokens = d > 1000 ? 2 : 5;
        const std::vector<float> weight = random_values(d, 3);
        std::vector<float> values = random_values(n_tokens * d, 2);
        values[d / 2] = d == 100 ? NAN : values[d / 2];
        std::vector<float> first;
        for (const Layout& layout : layouts(d, n_tokens, 1)) {
            Input x(layout, 1), branch(layout, values);
            Output out(layout);
            add_normed(x, branch, out.floats(), layout.stride1, weight.data());
            check_output(out, [&](int32_t row, int32_t i) {
                const double scale = exact_scale(branch.row(row), d);
                const double normed = branch.row(row)[i] * scale * weight[i];
                return Exact{x.row(row)[i] + normed, std::fabs(x.row(row)[i]) + std::fabs(normed)};
            });
            if (first.empty()) first = out.packed();
            CHECK(same(out.packed(), first));
            if (kDetectsRaces) continue;
            add_normed(x, branch, out.floats(), layout.stride1, weight.data(), Order::backward);
            CHECK(same(out.packed(), first));
            Input x_copy = x;
            add_normed(x_copy, branch, x_copy.data(), layout.stride1, weight.data());
            std::copy_n(reinterpret_cast<const unsigned char*>(x_copy.values.data()), out.bytes.size(),
                        out.bytes.begin());
            CHECK(same(out.packed(), first));
            add_normed(x, branch, branch.data(), layout.stride1, weight.data());
            std::copy_n(reinterpret_cast<const unsigned char*>(branch.values.data()), out.bytes.size(),
                        out.bytes.begin());
            CHECK(same(out.packed(), first));
        }
    }
}

namespace {

Exact exact_gelu(double x, double up) {
    const double exponent = -2.0 / std::log(2.0) * 0.79788456080286535588 * (x + 0.044715 * x * x * x);
    const double value = x / (1.0 + std::exp2(exponent)) * up;
    // A large exponent's rounding is seen; beyond 2^100, the formula gives a bit more than 0.
    return {value, std::fabs(value) * (1.0 + std::fabs(exponent) / 5.0) + 1e-22 * std::fabs(x * up)};
}

void gate(Input& gate_rows, Input& up, const OutputRows& out, Order order = Order::random) {
    const Layout& l = gate_rows.layout;
    launch_gated_gelu_rows({gate_rows.rows(), up.rows(), out, l.n, l.n1, l.n_rows()}, launch_in(order));
}

void check_gated(const Output& out, const Input& gate_rows, const Input& up) {
    check_output(out,
                 [&](int32_t row, int32_t i) { return exact_gelu(gate_rows.row(row)[i], up.row(row)[i]); });
}

}  // namespace

TEST_CASE("gated_gelu_rows: every length, layout and type") {
    for (const int32_t n : {1, 2, 31, 33, 100, 704, 1000, 2112}) {
        if (kDetectsRaces && n != 31 && n != 704) continue;
        CAPTURE(n);
        int32_t i_layout = 0;
        for (const Layout& layout : layouts(n, 3, 2)) {
            Input gates(layout, random_values(6 * n, 1, 3.0f)), up(layouts(n, 3, 2)[(i_layout + 1) % 3], 2);
            const FloatType type = kTypes[(i_layout + 2) % 3];
            Output out(layout, type), plain(layouts(n, 3, 2)[0]);
            gate(gates, up, out.rows());
            check_gated(out, gates, up);
            gate(gates, up, plain.rows());
            check_gated(plain, gates, up);
            gate(gates, up, gates.in_place());
            for (int32_t row = 0; row < 6; ++row)
                CHECK(std::equal(gates.row(row), gates.row(row) + n, plain.packed().begin() + row * n));
            ++i_layout;
        }
    }
}

TEST_CASE("gated_gelu_rows: halves of one row, in any order") {
    constexpr int32_t n = 704, n_used = 2, n_tokens = 3;
    Input both(matrix_layout(2 * n, n_used * n_tokens, 2 * n), 1);
    std::vector<float> gates, ups;
    for (int32_t row = 0; row < n_used * n_tokens; ++row) {
        gates.insert(gates.end(), both.row(row), both.row(row) + n);
        ups.insert(ups.end(), both.row(row) + n, both.row(row) + 2 * n);
    }
    const Layout packed = {n, n_used, n_tokens, n, n_used * n, 0};
    for (const Order order : kOrders) {
        Output out(packed, FloatType::bf16);
        const InputRows gate_rows = {both.data(), 2 * n, 2 * n * n_used};
        const InputRows up_rows = {both.data() + n, 2 * n, 2 * n * n_used};
        launch_gated_gelu_rows({gate_rows, up_rows, out.rows(), n, n_used, n_used * n_tokens},
                               launch_in(order));
        check_gated(out, Input(packed, gates), Input(packed, ups));
    }
}

TEST_CASE("gated_gelu_rows: large and non-finite gates") {
    const std::vector<float> values = {0.0f,  -0.0f, 1e-30f, 1e30f, 10.0f, -10.0f,   -5.0f,
                                       -9.5f, 88.0f, -88.0f, 4.0f,  NAN,   kInfinity};
    const auto n = static_cast<int32_t>(values.size());
    Input gates(matrix_layout(n, 1, n), values), up(matrix_layout(n, 1, n), std::vector<float>(n, 1.5f));
    Output out(matrix_layout(n, 1, n));
    gate(gates, up, out.rows());
    check_gated(out, gates, up);
}

TEST_CASE("kernels of a layer: every barrier and every mask is needed") {
    const auto results = [](Order order) {
        std::vector<float> all;
        const auto append = [&](const Output& out) {
            const std::vector<float> values = out.packed();
            all.insert(all.end(), values.begin(), values.end());
        };
        // One element that one thread alone sees; both blocks of norms, and heads.
        std::vector<float> values = random_values(2 * 600, 1);
        values[599] = values[600 + 33] = 1000.0f;
        Input x(matrix_layout(600, 2, 600), values), branch = x;
        append(norm(x, nullptr, FloatType::f32, order));
        Output sum(x.layout);
        add_normed(x, branch, sum.floats(), 600, nullptr, order);
        append(sum);
        Input heads(Layout{64, 2, 1, 64, 128, 0}, 3);
        Input angles(matrix_layout(64, 1, 64), angle_values(64, 1));
        Output rotated(heads.layout);
        rotate(heads, rotated.rows(), nullptr, angles, order);
        append(rotated);
        return all;
    };
    check_mutations(results, 1, 2);  // of one function, which all kernels call
}

}  // namespace testing
}  // namespace pydiffusion
