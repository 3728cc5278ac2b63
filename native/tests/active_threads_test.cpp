// How many threads are worth running.
#include "backend/cpu/active_threads.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

#include "support.h"

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pydiffusion {
namespace testing {

TEST_CASE("as many threads are left out as wait for a CPU") {
    CHECK(ActiveThreads::n_after(4, 0.0, false) == 4);
    CHECK(ActiveThreads::n_after(64, 1.2, false) == 64);  // of so many, the time of waking up
    CHECK(ActiveThreads::n_after(64, 1.6, false) == 62);
    CHECK(ActiveThreads::n_after(4, 0.4, false) == 4);  // a little is no reason
    CHECK(ActiveThreads::n_after(2, 0.5, false) == 1);  // beside one busy program on two CPUs
    CHECK(ActiveThreads::n_after(8, 1.0, false) == 7);
    CHECK(ActiveThreads::n_after(8, 3.6, false) == 4);
    CHECK(ActiveThreads::n_after(2, 1.4, false) == 1);
    CHECK(ActiveThreads::n_after(4, 9.0, false) == 1);  // the caller always works
    CHECK(ActiveThreads::n_after(1, 0.9, false) == 1);
    CHECK(ActiveThreads::n_after(5, 2.4, true) == 4);  // a trial ends where it began
    CHECK(ActiveThreads::n_after(5, 0.3, true) == 5);
}

namespace {

// Time and the delays of threads as a test sets them.
std::chrono::milliseconds time_of_test{0};
uint64_t delay_of_caller = 0, delay_of_others = 0;  // nanoseconds
long caller = -1;

ActiveThreads::Settings settings_of_test() {
    ActiveThreads::Settings settings;
    settings.delay_of = [](long id) { return id == caller ? delay_of_caller : delay_of_others; };
    settings.now = [] { return ActiveThreads::Clock::time_point(time_of_test); };
    return settings;
}

void compute_for(ActiveThreads& threads, int n_milliseconds) {
    for (int i = 0; i < n_milliseconds; ++i) {
        time_of_test += std::chrono::milliseconds(1);
        threads.end_phase();
    }
}

}  // namespace

TEST_CASE("threads that waited are left out, tried again, and kept when they no longer wait") {
    constexpr uint64_t milliseconds = 1'000'000;
    caller = -1;  // all threads are others
    ActiveThreads threads(3, settings_of_test());
    std::thread([&] { threads.register_thread(1); }).join();
    threads.begin_graph();
    compute_for(threads, 100);
    CHECK(threads.n() == 3);
    delay_of_others += 20 * milliseconds;  // each of three waits for most of a window
    compute_for(threads, 25);
    CHECK(threads.n() == 1);
    compute_for(threads, 399);
    CHECK(threads.n() == 1);
    compute_for(threads, 1);  // a trial
    CHECK(threads.n() == 2);
    delay_of_others += 20 * milliseconds;
    compute_for(threads, 25);  // which fails
    CHECK(threads.n() == 1);
    compute_for(threads, 400);  // another
    CHECK(threads.n() == 2);
    compute_for(threads, 25);  // which succeeds: the next thread at once
    CHECK(threads.n() == 3);
    compute_for(threads, 1000);
    CHECK(threads.n() == 3);
    threads.end_graph();
}

TEST_CASE("what the caller waits for between graphs is no reason") {
    constexpr uint64_t second = 1'000'000'000;
    delay_of_others = 0;
    for (const bool in_graph : {false, true}) {
        ActiveThreads threads(2, settings_of_test());
        threads.begin_graph();
#if defined(__linux__)
        caller = static_cast<long>(syscall(SYS_gettid));
        threads.begin_graph();
#endif
        compute_for(threads, 10);
        if (in_graph) delay_of_caller += second;
        threads.end_graph();
        if (!in_graph) delay_of_caller += second;
        threads.begin_graph();
        compute_for(threads, 20);
        CHECK(threads.n() == (in_graph ? 1 : 2));
    }
}

#if defined(__linux__)

namespace {

// Runs phases of a thousandth of a second on `threads` for some time, while a second thread computes too,
// both on one CPU if so asked; the number of active threads at the end.
int n_at_the_end(ActiveThreads& threads, bool on_one_cpu, double seconds) {
    cpu_set_t before, one;
    sched_getaffinity(0, sizeof before, &before);
    CPU_ZERO(&one);
    for (int cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++cpu)
        if (CPU_ISSET(cpu, &before)) CPU_SET(cpu, &one);
    if (on_one_cpu) sched_setaffinity(0, sizeof one, &one);
    std::atomic<bool> stop{false}, started{false};
    std::thread second([&] {  // which inherits the CPUs
        threads.register_thread(1);
        started = true;
        while (!stop) {
            if (threads.n() < 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    });
    while (!started) std::this_thread::yield();
    const auto now = [] { return std::chrono::steady_clock::now(); };
    const auto end = now() + std::chrono::duration<double>(seconds);
    threads.begin_graph();
    while (now() < end) {
        const auto phase = now() + std::chrono::milliseconds(1);
        while (now() < phase) {
        }
        threads.end_phase();
    }
    const int n = threads.n();
    stop = true;
    second.join();
    sched_setaffinity(0, sizeof before, &before);
    return n;
}

bool system_tells_delays() {
    FILE* file = std::fopen("/proc/self/schedstat", "r");
    if (file) std::fclose(file);
    return file != nullptr;
}

}  // namespace

TEST_CASE("two threads on one CPU: one is left out") {
    if (!system_tells_delays()) {
        std::puts("SKIPPED: this system has no /proc/self/schedstat");
        return;
    }
    ActiveThreads threads(2, {});
    CHECK(threads.n() == 2);
    CHECK(n_at_the_end(threads, true, 0.3) == 1);
}

#endif

}  // namespace testing
}  // namespace pydiffusion
