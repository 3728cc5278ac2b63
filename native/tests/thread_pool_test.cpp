// Graphs computed by the thread pool, and cancelled there.
#include "backend/cpu/thread_pool.h"

#include <atomic>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <thread>

#include "ggml-cpp.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

// x is doubled node by node.
struct Doublings {
    explicit Doublings(int n_nodes)
        : context(ggml_init({size_t{1} << 20, nullptr, false})),
          x(ggml_new_tensor_1d(context.get(), GGML_TYPE_F32, 1000)),
          result(x),
          graph(ggml_new_graph(context.get())) {
        std::fill_n(ggml_get_data_f32(x), 1000, 1.0f);
        for (int i = 0; i < n_nodes; ++i) result = ggml_add(context.get(), result, result);
        ggml_build_forward_expand(graph, result);
    }
    float value() const { return ggml_get_data_f32(result)[999]; }

    ggml_context_ptr context;
    ggml_tensor *x, *result;
    ggml_cgraph* graph;
};

const auto kNever = [] { return false; };

// A graph of every kind of node that is computed in stages, or split into pieces.
struct Stages {
    explicit Stages(bool one_query = false)
        : context(ggml_init({size_t{64} << 20, nullptr, false})), graph(ggml_new_graph(context.get())) {
        ggml_context* ctx = context.get();
        ggml_tensor* rows = random(GGML_TYPE_F16, 64, 600, 2);
        keep(ggml_flash_attn_ext(ctx, random(GGML_TYPE_F32, 64, one_query ? 1 : 30, 4), rows, rows, nullptr,
                                 0.1f, 0.0f, 0.0f));
        if (one_query) return;
        for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0,
                                     GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_XS}) {
            for (const int64_t n : {1, 7, 40}) {
                keep(ggml_mul_mat(ctx, random(type, 256, 100), random(GGML_TYPE_F32, 256, n)));
                keep(ggml_mul_mat_id(ctx, random(type, 256, 48, 6), random(GGML_TYPE_F32, 256, 1, n),
                                     choices(6, 2, n)));
            }
        }
        for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16})  // several matrices
            keep(ggml_mul_mat(ctx, random(type, 64, 50, 3), random(GGML_TYPE_F32, 64, 20, 6)));
        ggml_tensor* x = random(GGML_TYPE_F32, 100, 33);
        keep(ggml_rms_norm(ctx, x, 1e-6f));
        keep(ggml_soft_max_ext(ctx, ggml_scale(ctx, x, 3.0f), nullptr, 1.0f, 0.0f));
        keep(ggml_mul(ctx, ggml_concat(ctx, x, x, 0), ggml_pad(ctx, x, 100, 0, 0, 0)));
        keep(ggml_cont(ctx, ggml_transpose(ctx, ggml_gelu(ctx, x))));
        keep(ggml_argsort(ctx, x, GGML_SORT_ORDER_DESC));
    }

    std::vector<uint8_t> bytes() const {
        std::vector<uint8_t> all;
        for (const ggml_tensor* t : results) {
            const auto* data = static_cast<const uint8_t*>(t->data);
            all.insert(all.end(), data, data + ggml_nbytes(t));
        }
        return all;
    }

    ggml_context_ptr context;
    ggml_cgraph* graph;
    std::vector<ggml_tensor*> results;

  private:
    void keep(ggml_tensor* t) {
        results.push_back(t);
        ggml_build_forward_expand(graph, t);
    }
    ggml_tensor* random(ggml_type type, int64_t n0, int64_t n1, int64_t n2 = 1) {
        ggml_tensor* t = ggml_new_tensor_3d(context.get(), type, n0, n1, n2);
        std::vector<float> values(n0 * n1 * n2);
        for (float& value : values) value = std::normal_distribution<float>()(numbers);
        if (type == GGML_TYPE_F32) {
            std::memcpy(t->data, values.data(), ggml_nbytes(t));
        } else {
            ggml_quantize_chunk(type, values.data(), t->data, 0, n1 * n2, n0, nullptr);
        }
        return t;
    }
    ggml_tensor* choices(int32_t n_expert, int64_t n_used, int64_t n_tokens) {
        ggml_tensor* t = ggml_new_tensor_2d(context.get(), GGML_TYPE_I32, n_used, n_tokens);
        for (int64_t i = 0; i < n_used * n_tokens; ++i)
            static_cast<int32_t*>(t->data)[i] = static_cast<int32_t>(i * 5 % n_expert);
        return t;
    }

    std::mt19937 numbers{1};
};

void compute_by_ggml(ggml_cgraph* graph, int n_threads) {
    ggml_cplan plan = ggml_graph_plan(graph, n_threads, nullptr);
    std::vector<uint8_t> memory(plan.work_size);
    plan.work_data = memory.data();
    REQUIRE(ggml_graph_compute(graph, &plan) == GGML_STATUS_SUCCESS);
}

// Threads that sleep at once, and of which some are left out or come back after each phase.
std::atomic<int> n_asked{0};
ThreadPool::Settings restless() {
    ThreadPool::Settings settings;
    settings.spin_rounds = 0;
    settings.active.delay_of = [](long) { return static_cast<uint64_t>(++n_asked / 7) << 40; };
    settings.active.window = settings.active.trial_interval = {};
    return settings;
}

// A custom node of doublings of x, whose function also does `work` for each piece.
using Work = std::function<void(int piece, int n_pieces)>;
struct CustomNode {
    explicit CustomNode(Work work)
        : context(ggml_init({size_t{1} << 20, nullptr, false})),
          graph(ggml_new_graph(context.get())),
          work_(std::move(work)) {
        ggml_tensor* x = ggml_new_tensor_1d(context.get(), GGML_TYPE_F32, 10);
        const auto call = [](ggml_tensor*, int ith, int nth, void* work) {
            (*static_cast<Work*>(work))(ith, nth);
        };
        ggml_build_forward_expand(graph, ggml_custom_4d(context.get(), GGML_TYPE_F32, 10, 1, 1, 1, &x, 1,
                                                        call, GGML_N_TASKS_MAX, &work_));
    }

    ggml_context_ptr context;
    ggml_cgraph* graph;

  private:
    Work work_;
};

}  // namespace

TEST_CASE("the same bytes as ggml's own thread") {
    Stages expected;
    compute_by_ggml(expected.graph, 1);
    for (const int n_threads : {1, 2, 3, 7}) {
        Stages found;
        ThreadPool pool(n_threads);
        for (int i = 0; i < 3; ++i) {
            for (ggml_tensor* t : found.results) std::memset(t->data, 0xff, ggml_nbytes(t));
            pool.compute(found.graph, kNever);
            CHECK(found.bytes() == expected.bytes());
        }
    }
}

TEST_CASE("attention of one query, whose parts are summed: the same bytes as ggml's own threads") {
    for (const int n_threads : {1, 2, 3}) {
        Stages expected(true), found(true);
        compute_by_ggml(expected.graph, n_threads);
        ThreadPool pool(n_threads, restless());
        for (int i = 0; i < 20; ++i) {
            pool.compute(found.graph, kNever);
            CHECK(found.bytes() == expected.bytes());
        }
    }
}

TEST_CASE("the same bytes while threads are left out and come back") {
    Stages expected, found;
    compute_by_ggml(expected.graph, 1);
    n_asked = 0;
    ThreadPool pool(4, restless());
    for (int i = 0; i < 10; ++i) {
        for (ggml_tensor* t : found.results) std::memset(t->data, 0xff, ggml_nbytes(t));
        pool.compute(found.graph, kNever);
        REQUIRE(found.bytes() == expected.bytes());
    }
    CHECK(n_asked > 100);
}

TEST_CASE("many short graphs, by threads that sleep at once or are left out") {
    ThreadPool::Settings sleepy = restless();
    sleepy.active = {};
    for (const ThreadPool::Settings& settings : {sleepy, restless()}) {
        ThreadPool pool(3, settings);
        Doublings one(1), two(2);
        for (int i = 0; i < 3000; ++i) {
            pool.compute(one.graph, kNever);
            pool.compute(two.graph, kNever);
            REQUIRE(one.value() == 2.0f);
            REQUIRE(two.value() == 4.0f);
        }
    }
}

TEST_CASE("graphs of ggml's CPU backend run on the pool's threads") {
    ThreadPool pool(3);
    const ggml_backend_ptr backend(ggml_backend_cpu_init());
    ggml_backend_cpu_set_n_threads(backend.get(), 3);
    ggml_backend_cpu_set_threadpool(backend.get(), pool.for_ggml());
    std::atomic<int> n_calls{0};
    CustomNode custom([&](int, int) { ++n_calls; });
    REQUIRE(ggml_backend_graph_compute(backend.get(), custom.graph) == GGML_STATUS_SUCCESS);
    CHECK(n_calls > 3);  // pieces, more than there are threads: all threads are active at first

    Stages direct, by_backend;
    pool.compute(direct.graph, kNever);
    REQUIRE(ggml_backend_graph_compute(backend.get(), by_backend.graph) == GGML_STATUS_SUCCESS);
    CHECK(by_backend.bytes() == direct.bytes());
}

TEST_CASE("a thread that stands still holds up the piece that it has, and no other") {
    std::atomic<int> n_done{0};
    CustomNode node([&](int piece, int n_pieces) {
        // With fixed parts the rest of this thread's part would wait for it.
        while (piece == 0 && n_done < n_pieces - 1) std::this_thread::yield();
        ++n_done;
    });
    ThreadPool pool(2);
    pool.compute(node.graph, kNever);
    CHECK(n_done > 2);
}

TEST_CASE("every piece is computed once") {
    for (const int n_threads : {1, 2, 5}) {
        std::vector<std::atomic<int>> n_times(1000);
        std::atomic<int> n_pieces{0};
        CustomNode node([&](int piece, int n) {
            ++n_times[piece];
            n_pieces = n;
        });
        ThreadPool pool(n_threads);
        for (int i = 1; i <= 50; ++i) {
            pool.compute(node.graph, kNever);
            for (int piece = 0; piece < n_pieces; ++piece) REQUIRE(n_times[piece] == i);
        }
    }
}

TEST_CASE("an error of a piece is the caller's, and the pool usable afterwards") {
    for (const int n_threads : {1, 2, 5}) {
        CustomNode node([&](int piece, int) {
            if (piece == 0) throw std::runtime_error("a piece failed");
        });
        ThreadPool pool(n_threads);
        CHECK_THROWS_WITH(pool.compute(node.graph, kNever), "a piece failed");
        Doublings doublings(10);
        pool.compute(doublings.graph, kNever);
        CHECK(doublings.value() == 1024.0f);
    }
}

TEST_CASE("a graph without nodes to compute") {
    Doublings doublings(0);
    ThreadPool pool(2);
    pool.compute(doublings.graph, kNever);
    CHECK(doublings.value() == 1.0f);
}

TEST_CASE("a graph is computed, however many threads") {
    for (const int n_threads : {1, 2, 5}) {
        Doublings doublings(10);
        ThreadPool pool(n_threads);
        CHECK(pool.belongs_to_this_process());
        pool.compute(doublings.graph, kNever);
        CHECK(doublings.value() == 1024.0f);
    }
}

TEST_CASE("cancelled in the middle, and usable afterwards") {
    Doublings doublings(10);
    ThreadPool pool(2);
    int n_asked = 0;
    CHECK_ERROR(pool.compute(doublings.graph, [&] { return ++n_asked == 3; }), cancelled, "cancelled");
    CHECK(n_asked == 3);
    pool.compute(doublings.graph, kNever);
    CHECK(doublings.value() == 1024.0f);
}

TEST_CASE("stop_all cancels what is computed now and nothing later") {
    Doublings doublings(10);
    ThreadPool pool(2);
    CHECK_ERROR(pool.compute(doublings.graph,
                             [] {
                                 ThreadPool::stop_all();
                                 return false;
                             }),
                cancelled, "cancelled");
    pool.compute(doublings.graph, kNever);
    CHECK(doublings.value() == 1024.0f);
}

TEST_CASE("callers take turns") {
    ThreadPool pool(2);
    std::vector<std::unique_ptr<Doublings>> graphs;
    for (int i = 0; i < 4; ++i) graphs.push_back(std::make_unique<Doublings>(10));
    std::vector<std::thread> callers;
    for (auto& one : graphs) {
        callers.emplace_back([&] {
            for (int i = 0; i < 20; ++i) pool.compute(one->graph, kNever);
        });
    }
    for (std::thread& caller : callers) caller.join();
    for (const auto& one : graphs) CHECK(one->value() == 1024.0f);
}

}  // namespace testing
}  // namespace pydiffusion
