// ActiveThreads: how many of a pool's threads are worth running beside the other programs of the machine.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

namespace pydiffusion {

// A thread that waits for a CPU doesn't help: it may hold a piece that the others need. If more threads are
// ready than the system runs, some are left out, and tried again every now and then. What the system tells is
// the time that each thread was ready and not run (Linux: /proc/self/task/*/schedstat); where it doesn't, all
// are active. The first, which is the caller, always is.
class ActiveThreads {
  public:
    explicit ActiveThreads(int n_threads);

    int n() const { return n_.load(std::memory_order_relaxed); }
    // The calling thread works as thread `ith` from now on.
    void register_thread(int ith);
    // By one thread: a graph begins, and one of its phases is complete.
    void begin_graph();
    void end_phase();

    // n after a window in which threads waited for a CPU for `waited` of its length, all together.
    // is_trial: whether the last of them was added on trial.
    static int n_after(int n, double waited, bool is_trial);

  private:
    using Clock = std::chrono::steady_clock;

    double waited_since_last_window();
    void end_window();

    const int n_threads_;
    std::atomic<int> n_;
    std::vector<std::atomic<long>> ids_;  // of the system
    struct Delay {
        long id = 0;
        uint64_t nanoseconds = 0;
    };
    std::vector<Delay> delays_;  // at the end of the last window
    Clock::time_point last_;
    Clock::duration in_window_{}, until_trial_{};
    bool is_trial_ = false;
};

}  // namespace pydiffusion
