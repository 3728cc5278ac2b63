// Launches of our kernels, for the hook of ggml's CUDA backend (vendor/patches/0003).
#pragma once

#include <cublas_v2.h>

#include <atomic>

#include "ggml-cuda/common.cuh"

typedef bool (*ggml_cuda_custom_hook_t)(ggml_backend_cuda_context* ctx, ggml_tensor* dst);
extern std::atomic<ggml_cuda_custom_hook_t> ggml_cuda_custom_hook;  // in ggml-cuda.cu

namespace pydiffusion {

// Whether the device has code of the expert matmuls and room for so many of their blocks on a multiprocessor.
bool can_run_expert_matmuls(int device, int n_blocks);

// The same on repacked weights (repacked_weights.h): whether the device has the code, whether the sizes fit,
// and the launch of a node whose weights they are.
bool can_run_repacked_matmuls(int device);
bool fits_repacked(const ggml_tensor* weights, int64_t n_slots);
void multiply_repacked(cudaStream_t stream, const ggml_tensor* node);

// Whether the device has the code of attention_kernels.cuh; whether there is a kernel for a node of
// attention_node.h, which it launches unless ctx is null.
bool can_run_attention(int device);
bool compute_attention(ggml_backend_cuda_context* ctx, const ggml_tensor* node);

// Whether there is a kernel for a node of expert_nodes.h; launches it unless ctx is null.
bool compute_expert_node(ggml_backend_cuda_context* ctx, const ggml_tensor* node);

// Per backend with our kernels: a second stream, for work beside that of a graph. Created and destroyed
// with the device current.
class SideStream {
  public:
    SideStream(bool repacks_experts, bool attends);
    void create();  // throws Error if the GPU has no room; to be called once, before what follows
    ~SideStream();
    SideStream(const SideStream&) = delete;
    SideStream& operator=(const SideStream&) = delete;

    // From now on until the end of what is launched to stream(): after what `main` has been given so far.
    void begin(cudaStream_t main);
    // Ends it: join() will wait for what has been launched, or `main` does at once if set_in_turn().
    void finish(cudaStream_t main);
    void set_in_turn(bool in_turn) { in_turn_ = in_turn; }
    // Lets `main` wait for the last finish(), if it has not yet.
    void join(cudaStream_t main);

    cudaStream_t stream() const { return stream_; }
    cublasHandle_t cublas() const { return cublas_; }
    bool repacks_experts() const { return repacks_experts_; }  // for can_run_repacked_matmuls()
    bool attends() const { return attends_; }                  // for can_run_attention()

  private:
    bool repacks_experts_, attends_;
    cudaStream_t stream_ = nullptr;
    cudaEvent_t begin_ = nullptr, end_ = nullptr;
    cublasHandle_t cublas_ = nullptr;
    void* workspace_ = nullptr;
    bool is_pending_ = false, in_turn_ = false;
};

// That of a backend whose kernels are in use; null for others.
SideStream* side_stream_of(const ggml_backend_cuda_context* ctx);

// Whether there is a kernel for a custom node; launches it unless ctx is null.
bool compute_custom_node(ggml_backend_cuda_context* ctx, ggml_tensor* node);

}  // namespace pydiffusion
