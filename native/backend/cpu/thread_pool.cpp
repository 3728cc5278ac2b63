#include "backend/cpu/thread_pool.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "util/error.h"

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace pydiffusion {

namespace {

long process_id() {
#if defined(_WIN32)
    return 0;  // there is no fork
#else
    return static_cast<long>(getpid());
#endif
}

// ggml aborts the process if it can't start a thread, so start as many here first.
void require_threads(int n) {
    std::mutex gate;
    std::vector<std::thread> threads;
    threads.reserve(n);
    bool started = true;
    {
        const std::lock_guard<std::mutex> closed(gate);  // keeps all of them alive at once
        try {
            for (int i = 0; i < n; ++i)
                threads.emplace_back([&gate] { const std::lock_guard<std::mutex> pass(gate); });
        } catch (const std::system_error&) {
            started = false;
        }
    }
    for (std::thread& thread : threads) thread.join();
    if (!started) {
        throw Error(ErrorKind::out_of_memory,
                    format("failed to start %d threads: out of memory, or at the limit on processes (see "
                           "ulimit -u); choose a smaller n_threads",
                           n + 1));
    }
}

std::atomic<unsigned> n_stops{0};

struct Abort {
    const std::function<bool()>& cancelled;
    const unsigned n_stops_before = n_stops;
};

}  // namespace

ThreadPool::ThreadPool(int n_threads) : n_threads_(n_threads), process_(process_id()) {
    require_memory(size_t{8} << 20);
    require_threads(n_threads - 1);
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    params.poll = 1;  // spin for milliseconds; the default of a third of a second steals CPU time
    threads_ = ggml_threadpool_new(&params);
    if (!threads_) throw Error(ErrorKind::out_of_memory, format("failed to start %d threads", n_threads));
}

ThreadPool::~ThreadPool() { ggml_threadpool_free(threads_); }

bool ThreadPool::belongs_to_this_process() const { return process_ == process_id(); }

void ThreadPool::stop_all() { ++n_stops; }

void ThreadPool::compute(ggml_cgraph* graph, const std::function<bool()>& cancelled) {
    Abort abort{cancelled};
    const std::lock_guard<std::mutex> turn(turn_);
    // Kernels and custom ops allocate in the pool's threads, where an exception would end the process.
    require_memory((size_t{8} << 20) + (size_t{4} << 20) * n_threads_);
    ggml_cplan plan = ggml_graph_plan(graph, n_threads_, threads_);
    if (work_size_ < plan.work_size) {
        work_size_ = 0;
        work_.reset();
        work_.reset(new uint8_t[plan.work_size]);
        work_size_ = plan.work_size;
    }
    plan.work_data = work_.get();
    plan.abort_callback = [](void* data) {
        const auto* abort = static_cast<const Abort*>(data);
        return abort->cancelled() || n_stops != abort->n_stops_before;
    };
    plan.abort_callback_data = &abort;
    const ggml_status status = ggml_graph_compute(graph, &plan);
    if (status == GGML_STATUS_ABORTED) throw Error(ErrorKind::cancelled, "cancelled");
    if (status == GGML_STATUS_ALLOC_FAILED)
        throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate a graph's work buffer");
    if (status != GGML_STATUS_SUCCESS)
        throw Error(ErrorKind::general, format("ggml failed with status %d", status));
}

}  // namespace pydiffusion
