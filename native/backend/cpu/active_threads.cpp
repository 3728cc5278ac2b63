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

using namespace std::chrono_literals;

// Several time slices, so that a thread that shares a CPU has waited for it.
constexpr auto kWindow = 25ms;
// Between trials, of a window each: a failure makes one window of 16 slower by a fifth or so, and after the
// others have gone all threads are soon back.
constexpr auto kTrialInterval = 400ms;

#if defined(__linux__)

long id_of_this_thread() { return syscall(SYS_gettid); }

// How long the thread has been ready without running, in nanoseconds; 0 if not known.
uint64_t delay_of(long id) {
    char path[64];
    std::snprintf(path, sizeof path, "/proc/self/task/%ld/schedstat", id);
    unsigned long long ran = 0, waited = 0;
    if (FILE* file = std::fopen(path, "re")) {
        if (std::fscanf(file, "%llu %llu", &ran, &waited) != 2) waited = 0;
        std::fclose(file);
    }
    return waited;
}

#else

long id_of_this_thread() { return 0; }
uint64_t delay_of(long) { return 0; }

#endif

}  // namespace

ActiveThreads::ActiveThreads(int n_threads)
    : n_threads_(n_threads), n_(n_threads), ids_(n_threads), delays_(n_threads) {}

void ActiveThreads::register_thread(int ith) { ids_[ith] = id_of_this_thread(); }

void ActiveThreads::begin_graph() {
    register_thread(0);
    last_ = Clock::now();
}

void ActiveThreads::end_phase() {
    const auto now = Clock::now();
    in_window_ += now - last_;
    last_ = now;
    if (n_threads_ > 1 && in_window_ >= kWindow) end_window();
}

void ActiveThreads::end_window() {
    const double seconds = std::chrono::duration<double>(in_window_).count();
    const int n = n_, next = n_after(n, waited_since_last_window() / seconds, is_trial_);
    const bool succeeded = is_trial_ && next == n;
    until_trial_ = next < n ? kTrialInterval : until_trial_ - in_window_;
    in_window_ = {};
    is_trial_ = next == n && n < n_threads_ && (succeeded || until_trial_ <= Clock::duration::zero());
    n_ = is_trial_ ? n + 1 : next;
}

int ActiveThreads::n_after(int n, double waited, bool is_trial) {
    constexpr double tolerated = 0.4;
    if (waited <= tolerated) return n;
    const int n_waiting = is_trial ? 1 : std::max(1, static_cast<int>(std::lround(waited)));
    return std::max(1, n - n_waiting);
}

double ActiveThreads::waited_since_last_window() {
    uint64_t sum = 0;
    for (int i = 0; i < n_threads_; ++i) {
        const Delay now = {ids_[i], delay_of(ids_[i])};
        // Not of a thread that has taken this place since, nor of one that began later.
        if (now.id == delays_[i].id && now.nanoseconds > delays_[i].nanoseconds)
            sum += now.nanoseconds - delays_[i].nanoseconds;
        delays_[i] = now;
    }
    return 1e-9 * static_cast<double>(sum);
}

}  // namespace pydiffusion
