#include "backend/cpu/active_threads.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pydiffusion {

namespace {

#if defined(__linux__)
long id_of_this_thread() { return syscall(SYS_gettid); }
#else
long id_of_this_thread() { return 0; }
#endif

// Reading the delays of so many threads takes some 100 microseconds: with more, windows are longer.
constexpr int kThreadsPerWindow = 16;

}  // namespace

uint64_t ActiveThreads::delay_of(long id) {
    unsigned long long ran = 0, waited = 0;
#if defined(__linux__)
    char path[64];
    std::snprintf(path, sizeof path, "/proc/self/task/%ld/schedstat", id);
    if (FILE* file = std::fopen(path, "re")) {
        if (std::fscanf(file, "%llu %llu", &ran, &waited) != 2) waited = 0;
        std::fclose(file);
    }
#else
    (void)id;
    (void)ran;
#endif
    return waited;
}

ActiveThreads::ActiveThreads(int n_threads, const Settings& settings)
    : settings_(settings), n_threads_(n_threads), n_(n_threads), ids_(n_threads), before_(n_threads) {}

void ActiveThreads::register_thread(int ith) { ids_[ith] = id_of_this_thread(); }

void ActiveThreads::begin_graph() {
    if (n_threads_ == 1) return;
    register_thread(0);
    before_[0] = {ids_[0], settings_.delay_of(ids_[0])};
    last_ = settings_.now();
}

void ActiveThreads::end_graph() {
    if (n_threads_ > 1) caller_waited_ += waited_since(before_[0], 0);
}

void ActiveThreads::end_phase() {
    if (n_threads_ == 1) return;
    const auto now = settings_.now();
    in_window_ += now - last_;
    last_ = now;
    const int n_groups = (n_threads_ + kThreadsPerWindow - 1) / kThreadsPerWindow;
    if (in_window_ >= settings_.window * n_groups) end_window();
}

void ActiveThreads::end_window() {
    uint64_t waited = caller_waited_;
    for (int i = 0; i < n_threads_; ++i) waited += waited_since(before_[i], i);
    const auto length = std::chrono::duration_cast<std::chrono::nanoseconds>(in_window_).count();
    const int n = n_;
    const int next = n_after(n, static_cast<double>(waited) / static_cast<double>(length + 1), is_trial_);
    const bool succeeded = is_trial_ && next == n;
    until_trial_ = next < n ? settings_.trial_interval : until_trial_ - in_window_;
    is_trial_ = next == n && n < n_threads_ && (succeeded || until_trial_ <= Clock::duration::zero());
    n_ = is_trial_ ? n + 1 : next;
    in_window_ = {};
    caller_waited_ = 0;
}

int ActiveThreads::n_after(int n, double waited, bool is_trial) {
    // Every time that a thread is woken it waits for some microseconds.
    const double tolerated = std::max(0.4, 0.02 * n);
    if (waited <= tolerated) return n;
    const int n_waiting = is_trial ? 1 : std::max(1, static_cast<int>(std::lround(waited)));
    return std::max(1, n - n_waiting);
}

uint64_t ActiveThreads::waited_since(Delay& before, int ith) {
    const Delay now = {ids_[ith], settings_.delay_of(ids_[ith])};
    // Not of a thread that has taken this place since.
    const bool is_same = now.id == before.id && now.nanoseconds > before.nanoseconds;
    const uint64_t waited = is_same ? now.nanoseconds - before.nanoseconds : 0;
    before = now;
    return waited;
}

}  // namespace pydiffusion
