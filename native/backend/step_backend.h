// What a denoising step does beside the layers where those run on a device: self-conditioning in front of
// them and the sampler behind. The logits never leave the device.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "backend/step_state.h"
#include "ggml-backend.h"

namespace pydiffusion {

// Not thread-safe: calls hold the backend's turn. Each returns when its work is done, and throws Error where
// the device fails.
class StepBackend {
  public:
    virtual ~StepBackend() = default;

    // soft[:, t] = embedding_scale * sum over v of p[v, t] * embedding[:, v] for the first n positions, where
    // p is softmax(logits / previous_temperature) without, per position, at most dropped_mass of its mass;
    // zeros when the step has no self-conditioning. logits F32 [n_vocab, canvas_length], soft F32 [d, ...].
    virtual void condition(const ggml_tensor* logits, const ggml_tensor* embedding, ggml_tensor* soft,
                           int64_t n, const StepState& state) = 0;

    // Caps the first n rows of logits in place and measures them into state.measures.
    virtual void measure(ggml_tensor* logits, int64_t n, StepState& state) = 0;

    // Makes a position's logits -infinity but for one token's, which becomes `value`.
    virtual void pin(ggml_tensor* logits, int64_t position, int32_t token, float value) = 0;

    // What the device needs for work that the caller starts, be it these kernels' or a graph's: the time
    // between two events on the device itself, in which it may have waited for the host.
    virtual double seconds_of(const std::function<void()>& work) = 0;

    // Bytes per second that a large copy within the device's memory reads and writes (best of three).
    virtual double copy_rate() = 0;
};

// Positions that keep at most so many tokens of their distribution gather these tokens' embeddings; flatter
// ones go through a dense product with the whole embedding.
constexpr int32_t kMaxGathered = 1024;

// The same steps, warp by warp and lane by lane, on the processor: to prove them where there is no GPU.
std::unique_ptr<StepBackend> make_host_step_backend();

#if defined(PYDIFFUSION_CUDA)
// For the GPU of a CUDA backend, which has to outlive them.
std::unique_ptr<StepBackend> make_cuda_step_backend(ggml_backend_t backend);
#endif

}  // namespace pydiffusion
