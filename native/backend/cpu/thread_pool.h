// ThreadPool: the CPU threads that compute graphs.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "ggml-cpu.h"

namespace pydiffusion {

// Threads and their work buffer. Belongs to one process: threads do not survive a fork.
class ThreadPool {
  public:
    // Throws Error(out_of_memory) if the system does not allow that many threads.
    explicit ThreadPool(int n_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    ggml_threadpool_t threads() const { return threads_; }
    bool belongs_to_this_process() const;

    // Runs the graph on all threads; callers take turns. Throws Error(cancelled) soon after `cancelled`
    // begins to return true.
    void compute(ggml_cgraph* graph, const std::function<bool()>& cancelled);

    // Cancels what any pool computes now, at process exit; later graphs are not affected.
    static void stop_all();

  private:
    const int n_threads_;
    const long process_;
    ggml_threadpool_t threads_ = nullptr;
    std::mutex turn_;
    std::unique_ptr<uint8_t[]> work_;
    size_t work_size_ = 0;
};

}  // namespace pydiffusion
