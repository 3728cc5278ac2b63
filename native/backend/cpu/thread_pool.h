// ThreadPool: the CPU threads that compute graphs.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "backend/cpu/active_threads.h"
#include "backend/cpu/graph_phases.h"

namespace pydiffusion {

// Threads that share a machine. A graph is a list of phases, a phase a number of pieces, and threads take
// pieces as they come: whoever runs does the work. Nobody waits for a thread to arrive: one that the system
// doesn't run holds up the others by the piece that it has, if it has one. Threads that find none spin
// briefly, then sleep, so that the one they wait for gets their core.
//
// Belongs to one process: threads do not survive a fork.
class ThreadPool {
  public:
    struct Settings {
        int spin_rounds = kSpinRounds;  // before a thread that waits sleeps
        ActiveThreads::Settings active;
    };

    // Throws Error(out_of_memory) if the system does not allow that many threads.
    explicit ThreadPool(int n_threads) : ThreadPool(n_threads, Settings()) {}
    ThreadPool(int n_threads, const Settings& settings);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    // For ggml's CPU backend, whose graphs then run on these threads.
    ggml_threadpool_t for_ggml() const { return for_ggml_.get(); }
    bool belongs_to_this_process() const;

    // Runs the graph on all threads; callers take turns. Throws Error(cancelled) soon after `cancelled`
    // begins to return true.
    void compute(ggml_cgraph* graph, const std::function<bool()>& cancelled);

    // Cancels what any pool computes now, at process exit; later graphs are not affected.
    static void stop_all();

  private:
// Longer than the last pieces of a phase are apart, far shorter than a time slice, after which a thread that
// doesn't run comes on again. On x86-64 a round takes 40 to 140 cycles; elsewhere next to nothing.
#if defined(__x86_64__) || defined(_M_X64)
    static constexpr int kSpinRounds = 2000;
#else
    static constexpr int kSpinRounds = 50000;
#endif

    // Number of the phase, whether it is closed to threads that have not joined it, and how many have.
    class State {
      public:
        explicit State(uint64_t bits = kClosedBit) : bits_(bits) {}
        uint64_t bits() const { return bits_; }
        bool closed() const { return bits_ & kClosedBit; }
        uint32_t n_inside() const { return bits_ & (kClosedBit - 1); }
        bool same_phase(State other) const { return bits_ >> kPhaseShift == other.bits_ >> kPhaseShift; }
        State next_phase(bool closed) const {
            return State(((bits_ >> kPhaseShift) + 1) << kPhaseShift | (closed ? kClosedBit : 0));
        }
        static constexpr uint64_t kClosedBit = uint64_t{1} << 16;

      private:
        static constexpr int kPhaseShift = 17;
        uint64_t bits_;
    };

    // The pieces of a phase that one thread takes first; the others take from it when theirs are done.
    struct alignas(64) Range {
        std::atomic<int> next{0};
        int end = 0;
    };

    // The graph being computed.
    struct Job {
        const ggml_cplan* plan = nullptr;
        std::vector<Phase> phases;
        size_t current = 0;
        int n_threads = 1;  // that have a range of the current phase
        int n_pieces = 1;   // of that phase
        ggml_status status = GGML_STATUS_SUCCESS;
        std::exception_ptr error;  // of a piece
    };

    static ggml_status compute_for_ggml(void* pool, ggml_cgraph* graph, ggml_cplan* plan);
    void start_threads();
    void stop_threads();
    ggml_status run(ggml_cgraph* graph, const ggml_cplan& plan);
    // Works on phases as thread `ith`, until the state that `done` accepts.
    template <typename Done>
    void work(int ith, const Done& done);
    bool join(State seen);
    void take_pieces(int ith);
    void compute_one(const Phase& phase, int piece);
    void leave();
    void advance();
    void open_next_phase();
    void publish(State next);
    void wait_while(State seen);
    void wait_until_active(int ith);

    const Settings settings_;
    const int n_threads_;
    const long process_;
    std::unique_ptr<ggml_threadpool, decltype(&ggml_threadpool_free)> for_ggml_;
    std::mutex turn_;
    std::unique_ptr<uint8_t[]> work_;
    size_t work_size_ = 0;

    alignas(64) std::atomic<uint64_t> state_{State::kClosedBit};
    alignas(64) std::atomic<int> n_sleepers_{0};
    std::atomic<uint64_t> finished_{0};  // state after the last graph
    std::atomic<bool> stopping_{false};
    std::mutex sleep_;
    std::condition_variable changed_, activated_;
    ActiveThreads active_;
    Job job_;  // written while its phase is closed, by the only thread left inside
    std::vector<Range> ranges_;
    std::vector<std::thread> threads_;
};

}  // namespace pydiffusion
