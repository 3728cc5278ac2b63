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
    using Clock = std::chrono::steady_clock;

    // How long a thread of the system has been ready without running, in nanoseconds; 0 if not known.
    static uint64_t delay_of(long id);

    struct Settings {
        uint64_t (*delay_of)(long id) = ActiveThreads::delay_of;
        Clock::time_point (*now)() = Clock::now;
        // Several time slices, so that a thread that shares a CPU has waited for it.
        Clock::duration window = std::chrono::milliseconds(25);
        // Between trials of a window each: a failure makes one window of 16 slower by a fifth or so, and
        // after the others have gone all threads are soon back.
        Clock::duration trial_interval = std::chrono::milliseconds(400);
    };

    ActiveThreads(int n_threads, const Settings& settings);

    int n() const { return n_.load(std::memory_order_relaxed); }
    // The calling thread works as thread `ith` from now on.
    void register_thread(int ith);
    // By the caller, then by one thread at a time: a graph begins, one of its phases is complete, all are.
    void begin_graph();
    void end_phase();
    void end_graph();

    // n after a window in which threads waited for a CPU for `waited` of its length, all together.
    // is_trial: whether the last of them was added on trial.
    static int n_after(int n, double waited, bool is_trial);

  private:
    struct Delay {
        long id = 0;
        uint64_t nanoseconds = 0;
    };

    uint64_t waited_since(Delay& before, int ith);
    void end_window();

    const Settings settings_;
    const int n_threads_;
    std::atomic<int> n_;
    std::vector<std::atomic<long>> ids_;  // of the system
    // At the end of the last window; of the caller, which may wait between graphs too, at the last time that
    // a graph or a window began.
    std::vector<Delay> before_;
    uint64_t caller_waited_ = 0;  // in the graphs that have ended in this window, nanoseconds
    Clock::time_point last_;
    Clock::duration in_window_{}, until_trial_{};  // time in graphs
    bool is_trial_ = false;
};

}  // namespace pydiffusion
