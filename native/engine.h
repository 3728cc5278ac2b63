// Where graphs are computed: ggml's CPU kernels with a thread pool that is made once per model and process.
#pragma once

#include <atomic>
#include <functional>

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

namespace pydiffusion {

class Engine {
  public:
    explicit Engine(int n_threads);
    ~Engine();
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    int n_threads() const { return n_threads_; }
    const char* name() const { return "CPU"; }
    ggml_backend_buffer_type_t buffer_type() const { return ggml_backend_cpu_buffer_type(); }

    // Runs the graph; sessions take turns, since each run uses all threads. Throws Error(cancelled) soon
    // after `cancelled` begins to return true.
    void compute(ggml_cgraph* graph, const std::function<bool()>& cancelled);

  private:
    struct Pool;
    Pool& pool();

    int n_threads_;
    std::atomic<Pool*> pool_;
};

}  // namespace pydiffusion
