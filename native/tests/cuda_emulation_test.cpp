// The emulation of CUDA itself: right kernels give the same in every order, wrong ones are errors, and the
// primitives compute what the device does.
#include <cuda_fp16.h>

#include <cmath>

#include "backend/cuda/hopper.cuh"
#include "cuda_emulation/emulate.h"
#include "cuda_emulation/primitives.h"
#include "ggml.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

using namespace emulation;
using namespace cuda;

constexpr unsigned kAll = 0xffffffffu;

// --- kernels, right ones and wrong ones ---

__global__ void indices(uint3* threads, uint3* blocks) {
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
    threads[i] = threadIdx;
    blocks[i] = blockIdx;
}

__global__ void reverse(const int* x, int* y) {
    __shared__ int shared[96];
    shared[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
    __syncthreads();
    y[blockIdx.x * blockDim.x + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void warp_reverse(int* y, bool synchronized) {
    __shared__ int shared[32];
    shared[threadIdx.x] = static_cast<int>(threadIdx.x);
    if (synchronized) __syncwarp();
    y[threadIdx.x] = shared[31 - threadIdx.x];
}

__global__ void collectives(int* y) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int* mine = y + threadIdx.x * 8;
    mine[0] = __shfl_xor_sync(kAll, lane, 5);
    mine[1] = __shfl_up_sync(kAll, lane, 3);
    mine[2] = __shfl_down_sync(kAll, lane, 3);
    mine[3] = __shfl_sync(kAll, lane, 7);
    mine[4] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
    mine[5] = __any_sync(kAll, lane == 9) + 2 * __any_sync(kAll, false);
    mine[6] = __all_sync(kAll, lane >= 0) + 2 * __all_sync(kAll, lane != 9);
    mine[7] = static_cast<int>(__ballot_sync(lane < 16 ? 0xffffu : 0xffff0000u, true));  // each half its own
}

__global__ void some_reach_the_barrier() {
    if (threadIdx.x < 40) __syncthreads();
    if (threadIdx.x >= 40) __ballot_sync(kAll, true);
}

__global__ void some_end_before_the_barrier() {
    if (threadIdx.x == 50) return;
    __syncthreads();
}

__global__ void two_barriers() {
    if (threadIdx.x % 2 == 0) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

__global__ void lane_that_ended() {
    if (threadIdx.x == 3) return;
    __ballot_sync(kAll, true);
}

__global__ void different_masks() { __ballot_sync(threadIdx.x == 3 ? 0xfu : kAll, true); }

__global__ void shuffle_from_outside() {
    if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
}

// ThreadSanitizer instruments this program; its races are errors.
#if defined(__SANITIZE_THREAD__)
constexpr bool kDetectsRaces = true;
#else
constexpr bool kDetectsRaces = false;
#endif

std::string error_in(int n_threads, Order order, const std::function<void()>& kernel) {
    try {
        emulate(1, static_cast<unsigned>(n_threads), 0, order, kernel);
    } catch (const EmulationError& error) {
        return error.what();
    }
    return "no error";
}

bool contains(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("emulation: indices of threads and blocks") {
    for (const Order order : kOrders) {
        std::vector<uint3> threads(30 * 12, {99, 99, 99}), blocks = threads;
        emulate(dim3(3, 2, 2), dim3(5, 3, 2), 0, order, [&] { indices(threads.data(), blocks.data()); });
        for (unsigned i = 0; i < 30 * 12; ++i) {
            const unsigned t = i % 30, b = i / 30;
            const bool right = threads[i].x == t % 5 && threads[i].y == t / 5 % 3 && threads[i].z == t / 15 &&
                               blocks[i].x == b % 3 && blocks[i].y == b / 3 % 2 && blocks[i].z == b / 6;
            if (!right) FAIL_CHECK("thread ", i);
        }
    }
}

TEST_CASE("emulation: a barrier orders shared memory, and its absence shows") {
    std::vector<int> x(3 * 96), y(x.size());
    for (int i = 0; i < 3 * 96; ++i) x[i] = i;
    const auto is_right = [&](Order order) {
        std::fill(y.begin(), y.end(), -7);
        emulate(3, 96, 0, order, [&] { reverse(x.data(), y.data()); });
        for (int i = 0; i < 3 * 96; ++i)
            if (y[i] != i / 96 * 96 + 95 - i % 96) return false;
        return true;
    };
    for (const Order order : kOrders) CHECK(is_right(order));
    const std::vector<Mutation> faults = mutations_of([&] { is_right(Order::forward); });
    REQUIRE(faults.size() == 1);
    CHECK(contains(faults[0].text(), "cuda_emulation_test.cpp:"));
    for (const Order order : kOrders) {
        bool noticed = false, raced = false;
        try {
            with_mutation(faults[0], [&] { noticed = !is_right(order); });
        } catch (const EmulationError& error) {
            raced = contains(error.what(), "a data race");
        }
        CHECK((kDetectsRaces ? raced : noticed));
    }
}

TEST_CASE("emulation: lanes of a warp run apart without __syncwarp") {
    int y[32];
    for (const Order order : kOrders) {
        emulate(1, 32, 0, order, [&] { warp_reverse(y, true); });
        for (int i = 0; i < 32; ++i) CHECK(y[i] == 31 - i);
        bool noticed = false, raced = false;
        try {
            emulate(1, 32, 0, order, [&] { warp_reverse(y, false); });
            for (int i = 0; i < 32; ++i) noticed = noticed || y[i] != 31 - i;
        } catch (const EmulationError& error) {
            raced = contains(error.what(), "a data race");
        }
        CHECK((kDetectsRaces ? raced : noticed));
    }
}

TEST_CASE("emulation: shuffles and votes") {
    for (const Order order : kOrders) {
        std::vector<int> y(64 * 8);
        emulate(1, 64, 0, order, [&] { collectives(y.data()); });
        for (int i = 0; i < 64; ++i) {
            const int lane = i % 32;
            const std::vector<int> found(y.begin() + i * 8, y.begin() + (i + 1) * 8);
            const int expected_half = static_cast<int>(lane < 16 ? 0xffffu : 0xffff0000u);
            CHECK(found == std::vector<int>{lane ^ 5, lane < 3 ? lane : lane - 3, lane > 28 ? lane : lane + 3,
                                            7, 0x49249249, 1, 1, expected_half});
        }
    }
}

TEST_CASE("emulation: errors name the line, the block and the thread") {
    for (const Order order : kOrders) {
        const std::string barrier = error_in(96, order, some_reach_the_barrier);
        CHECK(contains(barrier, "some_reach_the_barrier (cuda_emulation_test.cpp:"));
        CHECK(contains(barrier, "block (0, 0, 0), thread (40, 0, 0): "));
        CHECK(contains(barrier, "deadlock: lanes 0x000000ff of the mask 0xffffffff never arrive"));
        CHECK(contains(error_in(64, order, some_end_before_the_barrier),
                       "thread (0, 0, 0): a barrier while thread (50, 0, 0) has ended"));
        CHECK(contains(error_in(32, order, two_barriers), "waits at another, two_barriers"));
        CHECK(contains(error_in(32, order, lane_that_ended), "lane 3 of the mask 0xffffffff has ended"));
        CHECK(contains(error_in(32, order, different_masks), "mask"));
        CHECK(contains(error_in(32, order, shuffle_from_outside), "from lane 20, which is not in the mask"));
        CHECK(contains(error_in(16, order, different_masks), "lanes beyond the block"));
    }
    // Nothing of an error remains.
    int y[32];
    emulate(1, 32, 0, Order::forward, [&] { warp_reverse(y, true); });
    CHECK(y[0] == 31);
}

// --- primitives ---

namespace {

// Two groups of copies per thread; returns what the threads see of both after waiting for all but n_left.
__global__ void two_copies(const float* x, int n_bytes, int n_left, float* y) {
    auto* shared = reinterpret_cast<float*>(dynamic_shared()) + threadIdx.x * 8;
    for (int i = 0; i < 2; ++i) {
        copy_async_16(shared + 4 * i, x + 8 * threadIdx.x + 4 * i, n_bytes);
        copy_async_commit();
    }
    if (n_left == 0) copy_async_wait<0>();
    if (n_left == 1) copy_async_wait<1>();
    for (int i = 0; i < 8; ++i) y[threadIdx.x * 8 + i] = shared[i];
    copy_async_wait<0>();
}

__global__ void copy_without_wait(const float* x) { copy_async_16(dynamic_shared(), x, 16); }

__global__ void misaligned_copy(const float* x) { copy_async_16(dynamic_shared() + 4, x, 16); }

struct alignas(16) Aligned {
    float x[64];
};

}  // namespace

TEST_CASE("emulation: copies arrive in the wait, filled up with zeros") {
    Aligned x;
    for (int i = 0; i < 64; ++i) x.x[i] = static_cast<float>(i + 1);
    for (const Order order : kOrders) {
        for (const int n_bytes : {0, 4, 12, 16}) {
            for (const int n_left : {0, 1, 2}) {
                std::vector<float> y(64);
                emulate(1, 8, 8 * 32, order, [&] { two_copies(x.x, n_bytes, n_left, y.data()); });
                for (int i = 0; i < 64; ++i) {
                    const bool arrived = i / 4 % 2 < 2 - n_left;
                    const float expected = i % 4 * 4 < n_bytes ? x.x[i] : 0.0f;
                    if (arrived ? y[i] != expected : !std::isnan(y[i])) FAIL_CHECK("at ", i);
                }
            }
        }
    }
    const auto error = [&](const std::function<void()>& kernel) {
        try {
            emulate(1, 1, 32, Order::forward, kernel);
        } catch (const EmulationError& error) {
            return std::string(error.what());
        }
        return std::string("no error");
    };
    CHECK(contains(error([&] { copy_without_wait(x.x); }), "that no copy_async_wait waited for"));
    CHECK(contains(error([&] { misaligned_copy(x.x); }), "to a misaligned address"));
    CHECK(contains(error([&] { copy_without_wait(x.x + 1); }), "from a misaligned address"));
}

namespace {

// Two phases of a barrier, each with a bulk copy of 16 bytes; [phase][before and after the wait][thread]
__global__ void bulk_copies(const float* x, float* y) {
    auto* shared = reinterpret_cast<float*>(dynamic_shared());
    auto* barrier = reinterpret_cast<uint64_t*>(shared + 8);
    if (threadIdx.x == 0) barrier_init(barrier, 1);
    for (unsigned phase = 0; phase < 2; ++phase) {
        if (threadIdx.x == 0) {
            barrier_arrive_expecting(barrier, 16);
            copy_bulk(shared + 4 * phase, x + 4 * phase, 16, barrier);
        }
        __syncthreads();
        y[8 * phase + threadIdx.x] = shared[4 * phase + threadIdx.x];
        __syncthreads();
        barrier_wait(barrier, phase);
        y[8 * phase + 4 + threadIdx.x] = shared[4 * phase + threadIdx.x];
    }
}

__global__ void wrong_bulk_copy(const float* x, bool initialized, int n_expected, bool waits) {
    auto* barrier = reinterpret_cast<uint64_t*>(dynamic_shared() + 16);
    if (initialized) barrier_init(barrier, 1);
    if (n_expected > 0) barrier_arrive_expecting(barrier, n_expected);
    copy_bulk(dynamic_shared(), x, 16, barrier);
    if (waits) barrier_wait(barrier, 0);
}

}  // namespace

TEST_CASE("emulation: bulk copies arrive in the wait for their barrier") {
    Aligned x;
    for (int i = 0; i < 64; ++i) x.x[i] = static_cast<float>(i + 1);
    for (const Order order : kOrders) {
        std::vector<float> y(16);
        emulate(1, 4, 40, order, [&] { bulk_copies(x.x, y.data()); });
        for (int i = 0; i < 16; ++i) {
            const bool waited = i / 4 % 2 == 1;
            if (waited ? y[i] != x.x[i / 8 * 4 + i % 4] : !std::isnan(y[i])) FAIL_CHECK("at ", i);
        }
    }
    const auto error = [&](const float* from, bool initialized, int n_expected, bool waits) {
        try {
            emulate(1, 1, 32, Order::forward, [&] { wrong_bulk_copy(from, initialized, n_expected, waits); });
        } catch (const EmulationError& error) {
            return std::string(error.what());
        }
        return std::string("no error");
    };
    CHECK(error(x.x, true, 16, true) == "no error");
    CHECK(contains(error(x.x, false, 0, true), "that no thread has initialized"));
    CHECK(contains(error(x.x, true, 0, true), "a wait for arrivals that never come"));
    CHECK(contains(error(x.x, true, 32, true), "expects 32 bytes, but gets 16"));
    CHECK(contains(error(x.x, true, 16, false), "that no barrier_wait waited for"));
    CHECK(contains(error(x.x + 1, true, 16, true), "from a misaligned address"));
}

TEST_CASE("emulation: mma multiplies tiles held as in the PTX manual") {
    const std::vector<float> a = random_values(16 * 16, 1), b = random_values(16 * 8, 2),
                             c = random_values(16 * 8, 3);
    const auto half = [](float x) { return half_to_float(half_from(x)); };
    std::vector<float> found(16 * 8);
    emulate(1, 32, 0, Order::random, [&] {
        const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
        const auto pair_of_a = [&](int row, int k) { return half2_of(a[row * 16 + k], a[row * 16 + k + 1]); };
        const auto pair_of_b = [&](int k) { return half2_of(b[k * 8 + g], b[(k + 1) * 8 + g]); };
        const uint32_t a_words[4] = {pair_of_a(g, 2 * t), pair_of_a(g + 8, 2 * t), pair_of_a(g, 2 * t + 8),
                                     pair_of_a(g + 8, 2 * t + 8)};
        const uint32_t b_words[2] = {pair_of_b(2 * t), pair_of_b(2 * t + 8)};
        float* rows[2] = {&found[g * 8 + 2 * t], &found[(g + 8) * 8 + 2 * t]};
        float d[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t],
                      c[(g + 8) * 8 + 2 * t + 1]};
        mma_16x8x16(d, a_words, b_words);
        for (int i = 0; i < 4; ++i) rows[i / 2][i % 2] = d[i];
    });
    for (int row = 0; row < 16; ++row) {
        for (int n = 0; n < 8; ++n) {
            double sum = 0.0;
            for (int k = 0; k < 16; ++k) sum += double{half(a[row * 16 + k])} * half(b[k * 8 + n]);
            CHECK(found[row * 8 + n] == static_cast<float>(c[row * 8 + n] + sum));
        }
    }
}

TEST_CASE("emulation: float16 is rounded to nearest even") {
    for (int i = 0; i < 65536; ++i) {
        const auto bits = static_cast<uint16_t>(i);
        const float value = ggml_fp16_to_fp32(bits);
        const float found = half_to_float(bits);
        const bool same = std::isnan(value) ? std::isnan(found) && half2_of(found, 0.0f) == 0x7fff
                                            : found == value && std::signbit(found) == std::signbit(value) &&
                                                  half2_of(0.0f, found) >> 16 == bits;
        if (!same) FAIL_CHECK("of ", i);
    }
    std::mt19937 generator(4);
    for (int i = 0; i < 200000; ++i) {
        const auto word = static_cast<uint32_t>(generator());
        // Every exponent of float16, with ties and their neighbors.
        const uint32_t bits = (word & 0x80000000u) | ((100 + word % 46) << 23) | (word >> 8 & 0x7fe000u) |
                              (i % 4 == 0   ? 0x1000u
                               : i % 4 == 1 ? 0x0fffu
                                            : word >> 3 & 0x1fffu);
        float x;
        std::memcpy(&x, &bits, sizeof x);
        if (half2_of(x, x) >> 16 != ggml_fp32_to_fp16(x)) FAIL_CHECK("of ", x);
    }
}

TEST_CASE("emulation: byte_permute") {
    CHECK(byte_permute(0x33221100u, 0x77665544u, 0x7531) == 0x77553311u);
    CHECK(byte_permute(0x33221100u, 0x77665544u, 0x0426) == 0x00442266u);
    CHECK_THROWS_AS(byte_permute(0, 0, 0x8000), EmulationError);
}

}  // namespace testing
}  // namespace pydiffusion
