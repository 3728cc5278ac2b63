#include "backend/cpu/thread_pool.h"

#include <algorithm>

#include "util/error.h"

#if !defined(_WIN32)
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

// Of vendor/patches/0002, in ggml-cpu.c.
extern "C" void ggml_threadpool_set_compute(ggml_threadpool* pool,
                                            ggml_status (*compute)(void*, ggml_cgraph*, ggml_cplan*),
                                            void* data);

namespace pydiffusion {

namespace {

long process_id() {
#if defined(_WIN32)
    return 0;  // there is no fork
#else
    return static_cast<long>(getpid());
#endif
}

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

std::atomic<unsigned> n_stops{0};

struct Abort {
    const std::function<bool()>& cancelled;
    const unsigned n_stops_before = n_stops;
};

ggml_threadpool_t new_pool_of_ggml() {
    const ggml_threadpool_params params = ggml_threadpool_params_default(1);
    return ggml_threadpool_new(const_cast<ggml_threadpool_params*>(&params));
}

}  // namespace

ThreadPool::ThreadPool(int n_threads, const Settings& settings)
    : settings_(settings),
      n_threads_(n_threads),
      process_(process_id()),
      for_ggml_(nullptr, ggml_threadpool_free),
      active_(n_threads, settings.active),
      ranges_(n_threads) {
    require_memory(size_t{8} << 20);
    for_ggml_.reset(new_pool_of_ggml());
    if (!for_ggml_) throw Error(ErrorKind::out_of_memory, "out of memory: failed to create a thread pool");
    ggml_threadpool_set_compute(for_ggml_.get(), compute_for_ggml, this);
    start_threads();
}

void ThreadPool::start_threads() {
    threads_.reserve(n_threads_ - 1);
    try {
        for (int ith = 1; ith < n_threads_; ++ith)
            threads_.emplace_back([this, ith] {
                active_.register_thread(ith);
                work(ith, [this](State) { return stopping_.load(); });
            });
    } catch (const std::exception&) {  // system_error or bad_alloc
        stop_threads();
        throw Error(ErrorKind::out_of_memory,
                    format("failed to start %d threads: out of memory, or at the limit on processes (see "
                           "ulimit -u); choose a smaller n_threads",
                           n_threads_));
    }
}

void ThreadPool::stop_threads() {
    stopping_ = true;
    publish(State(state_.load()).next_phase(true));
    {
        const std::lock_guard<std::mutex> lock(sleep_);
    }
    activated_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

ThreadPool::~ThreadPool() { stop_threads(); }

bool ThreadPool::belongs_to_this_process() const { return process_ == process_id(); }

void ThreadPool::stop_all() { ++n_stops; }

void ThreadPool::compute(ggml_cgraph* graph, const std::function<bool()>& cancelled) {
    Abort abort{cancelled};
    const std::lock_guard<std::mutex> turn(turn_);
    // Kernels and custom ops allocate while they compute: better to find out before.
    require_memory((size_t{8} << 20) + (size_t{4} << 20) * n_threads_);
    ggml_cplan plan = ggml_graph_plan(graph, n_threads_, for_ggml_.get());
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
    const ggml_status status = run(graph, plan);
    if (job_.error) std::rethrow_exception(job_.error);
    if (status == GGML_STATUS_ABORTED) throw Error(ErrorKind::cancelled, "cancelled");
}

ggml_status ThreadPool::compute_for_ggml(void* data, ggml_cgraph* graph, ggml_cplan* plan) {
    auto* pool = static_cast<ThreadPool*>(data);
    std::unique_lock<std::mutex> turn(pool->turn_, std::defer_lock);
    if (pool->belongs_to_this_process()) {
        turn.lock();
    } else if (!turn.try_lock()) {
        return GGML_STATUS_FAILED;  // forked in the middle of a graph, which nobody ends
    }
    try {
        const ggml_status status = pool->run(graph, *plan);
        if (pool->job_.error) std::rethrow_exception(pool->job_.error);
        return status;
    } catch (const std::bad_alloc&) {
        return GGML_STATUS_ALLOC_FAILED;
    } catch (...) {
        return GGML_STATUS_FAILED;
    }
}

ggml_status ThreadPool::run(ggml_cgraph* graph, const ggml_cplan& plan) {
    job_ = {};
    job_.plan = &plan;
    job_.phases = phases_of(graph);
    if (job_.phases.empty()) return GGML_STATUS_SUCCESS;
    active_.begin_graph();
    open_next_phase();
    // Not before the last state is published: a thread that has yet to do that would undo the next graph's.
    work(0, [this](State seen) { return seen.bits() == finished_; });
    return job_.status;
}

template <typename Done>
void ThreadPool::work(int ith, const Done& done) {
    for (;;) {
        const State seen(state_.load());
        if (done(seen)) return;
        if (ith >= active_.n()) {
            wait_until_active(ith);
        } else if (seen.closed()) {
            wait_while(seen);
        } else if (join(seen)) {
            take_pieces(ith);
            leave();
        }
    }
}

bool ThreadPool::join(State seen) {
    uint64_t expected = seen.bits();
    return state_.compare_exchange_weak(expected, expected + 1);
}

void ThreadPool::take_pieces(int ith) {
    const Phase& phase = job_.phases[job_.current];
    for (int i = 0; i < job_.n_threads; ++i) {
        Range& range = ranges_[(ith + i) % job_.n_threads];
        while (range.next.load(std::memory_order_relaxed) < range.end) {
            const int piece = range.next.fetch_add(1, std::memory_order_relaxed);
            if (piece < range.end) compute_one(phase, piece);
        }
    }
}

void ThreadPool::compute_one(const Phase& phase, int piece) {
    try {
        compute_piece(phase, *job_.plan, piece, job_.n_pieces);
    } catch (...) {
        const std::lock_guard<std::mutex> lock(sleep_);
        if (!job_.error) job_.error = std::current_exception();
    }
}

void ThreadPool::leave() {
    state_.fetch_or(State::kClosedBit);  // there are no more pieces
    if (State(state_.fetch_sub(1)).n_inside() == 1) advance();
}

// By the last thread inside: nobody else touches the job until the next phase is open.
void ThreadPool::advance() {
    ++job_.current;
    const int n_active = active_.n();
    active_.end_phase();
    if (job_.plan->abort_callback && job_.plan->abort_callback(job_.plan->abort_callback_data))
        job_.status = GGML_STATUS_ABORTED;
    if (job_.error) job_.status = GGML_STATUS_FAILED;
    if (active_.n() > n_active) {
        {
            const std::lock_guard<std::mutex> lock(sleep_);
        }
        activated_.notify_all();
    }
    if (job_.status == GGML_STATUS_SUCCESS && job_.current < job_.phases.size()) {
        open_next_phase();
    } else {
        active_.end_graph();
        const State end = State(state_.load()).next_phase(true);
        finished_ = end.bits();
        publish(end);
    }
}

void ThreadPool::open_next_phase() {
    const Phase& phase = job_.phases[job_.current];
    const bool same_node = job_.current > 0 && job_.phases[job_.current - 1].node == phase.node;
    if (!same_node) job_.n_threads = std::min(active_.n(), job_.plan->n_threads);
    const int n = job_.n_threads, n_pieces = job_.n_pieces = n_pieces_of(phase, n, *job_.plan);
    begin_phase(*job_.plan, n_pieces);
    for (int i = 0; i < n; ++i) {
        ranges_[i].next.store(n_pieces * i / n, std::memory_order_relaxed);
        ranges_[i].end = n_pieces * (i + 1) / n;
    }
    publish(State(state_.load()).next_phase(false));
}

void ThreadPool::publish(State next) {
    state_.store(next.bits());
    if (n_sleepers_.load() == 0) return;
    // Either a thread about to sleep sees the new state, or this one sees that it sleeps. Taken, the mutex
    // says that no thread is between its look at the state and its sleep.
    {
        const std::lock_guard<std::mutex> lock(sleep_);
    }
    changed_.notify_all();
}

void ThreadPool::wait_while(State seen) {
    const auto changed = [&] { return !State(state_.load()).same_phase(seen); };
    for (int i = 0; i < settings_.spin_rounds; ++i) {
        if (changed()) return;
        relax();
    }
    ++n_sleepers_;
    {
        std::unique_lock<std::mutex> lock(sleep_);
        changed_.wait(lock, changed);
    }
    --n_sleepers_;
}

void ThreadPool::wait_until_active(int ith) {
    std::unique_lock<std::mutex> lock(sleep_);
    activated_.wait(lock, [&] { return ith < active_.n() || stopping_; });
}

}  // namespace pydiffusion
