// Graphs computed by the thread pool, and cancelled there.
#include "backend/cpu/thread_pool.h"

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

}  // namespace

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
