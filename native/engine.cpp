#include "engine.h"

#include <cstdlib>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "errors.h"

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace pydiffusion {

namespace {

long process_id() {
#if defined(_WIN32)
    return 0;  // no fork there
#else
    return static_cast<long>(getpid());
#endif
}

// ggml aborts the process where it can't start a thread, so try before it does.
void require_threads(int n) {
    std::mutex gate;
    std::vector<std::thread> threads;
    threads.reserve(n);
    bool started = true;
    {
        const std::lock_guard<std::mutex> closed(gate);  // all of them live at the same time
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
                    format("%d threads can't be started: memory or a limit on processes does not permit; "
                           "choose a smaller n_threads",
                           n + 1));
    }
}

// ggml multiplies fewer than 8 columns (tokens of an expert, the rest of a prompt) with another kernel, whose
// sums differ in the last bits. With one kernel throughout, no answer depends on what else was in the batch
// or how a prompt was cut; a step costs less than a hundredth more. ggml reads this once, at its first
// product.
void take_one_kernel_for_all_widths() {
#if defined(_WIN32)
    if (!std::getenv("GGML_CPU_TILED_MM_FORCE")) _putenv_s("GGML_CPU_TILED_MM_FORCE", "1");
#else
    setenv("GGML_CPU_TILED_MM_FORCE", "1", 0);
#endif
}

}  // namespace

// Threads and work area: of one process, since threads do not survive a fork.
struct Engine::Pool {
    explicit Pool(int n_threads) {
        require_memory(size_t{8} << 20);
        require_threads(n_threads - 1);
        ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
        threads = ggml_threadpool_new(&params);
        if (!threads) throw Error(ErrorKind::out_of_memory, format("could not start %d threads", n_threads));
    }
    ~Pool() { ggml_threadpool_free(threads); }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    const long process = process_id();
    ggml_threadpool_t threads;
    std::mutex turn;
    std::unique_ptr<uint8_t[]> work;
    size_t work_size = 0;
};

Engine::Engine(int n_threads) : n_threads_(n_threads) {
    take_one_kernel_for_all_widths();
    ggml_cpu_init();
    pool_ = new Pool(n_threads);
}

Engine::~Engine() {
    const Pool* pool = pool_.load();
    if (pool->process == process_id()) delete pool;
}

// In a child after fork there are none of the parent's threads, and its lock may be held for ever: the child
// starts a pool of its own, and leaves the parent's alone.
Engine::Pool& Engine::pool() {
    Pool* current = pool_.load();
    if (current->process == process_id()) return *current;
    auto own = std::make_unique<Pool>(n_threads_);
    if (pool_.compare_exchange_strong(current, own.get())) return *own.release();
    return *current;  // another thread of the child was faster
}

void Engine::compute(ggml_cgraph* graph, const std::function<bool()>& cancelled) {
    Pool& pool = this->pool();
    const std::lock_guard<std::mutex> turn(pool.turn);
    // For what the kernels and our own operations allocate in the pool's threads, where nothing may throw.
    require_memory((size_t{8} << 20) + (size_t{1} << 20) * n_threads_);
    ggml_cplan plan = ggml_graph_plan(graph, n_threads_, pool.threads);
    if (pool.work_size < plan.work_size) {
        pool.work_size = 0;
        pool.work.reset();
        pool.work.reset(new uint8_t[plan.work_size]);
        pool.work_size = plan.work_size;
    }
    plan.work_data = pool.work.get();
    plan.abort_callback = [](void* test) { return (*static_cast<const std::function<bool()>*>(test))(); };
    plan.abort_callback_data = const_cast<std::function<bool()>*>(&cancelled);
    const ggml_status status = ggml_graph_compute(graph, &plan);
    if (status == GGML_STATUS_ABORTED) throw Error(ErrorKind::cancelled, "cancelled");
    if (status == GGML_STATUS_ALLOC_FAILED)
        throw Error(ErrorKind::out_of_memory, "no memory for a step's work area");
    if (status != GGML_STATUS_SUCCESS)
        throw Error(ErrorKind::general, format("ggml failed with status %d", status));
}

}  // namespace pydiffusion
