// StepBackend: the parts of a denoising step outside the layers, on a device: self-conditioning before them
// and sampling after them. The logits never leave the device.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "sampler/step_state.h"

namespace pydiffusion {

// Rows of a quantized embedding that are converted to float16 and multiplied at a time; device plans count
// two such buffers.
constexpr int64_t kDenseRows = 8192;

// Floats per position of StepState::sums.
int64_t n_sums(int64_t n_vocab);

// Not thread-safe: hold Backend::lock_devices(). The work of a call comes after what the device was given
// before and before what it is given next, also if the call returns sooner: only results on the host are
// complete then. Calls throw Error if the device fails, at this work or at earlier work.
class StepBackend {
  public:
    virtual ~StepBackend() = default;

    // soft[:, t] = embedding_scale * sum over v of p[v, t] * embedding[:, v] for the first n positions, where
    // p is softmax(logits / previous_temperature) without its smallest entries, which sum to at most
    // dropped_mass per position; zeros if the step has no self-conditioning. logits F32
    // [n_vocab, canvas_length], soft F32 [d, ...].
    virtual void condition(const ggml_tensor* logits, const ggml_tensor* embedding, ggml_tensor* soft,
                           int64_t n, const StepState& state) = 0;

    // Soft-caps the first n rows of logits in place and writes state.measures; state.sums too where
    // condition() uses them.
    virtual void measure(ggml_tensor* logits, int64_t n, StepState& state) = 0;

    // Sets a position's logits to -infinity, except one token's, which becomes `value`, and state.sums
    // likewise.
    virtual void pin(ggml_tensor* logits, int64_t position, int32_t token, float value,
                     const StepState& state) = 0;

    // See Candidates, of the first n rows of logits. By default the rows are copied to the host one by one.
    // Unlike the others this is called without the lock, so that sessions need not wait for each other's
    // ranking.
    virtual Candidates candidates(const ggml_tensor* logits, int64_t n, int32_t k,
                                  const std::vector<int32_t>& extra);

    // Device time of `work`, which may launch these kernels or a graph: the time between two events recorded
    // on the device, including any wait for the host.
    virtual double seconds_of(const std::function<void()>& work) = 0;

    // Bytes per second that a large device-to-device copy reads and writes (best of three).
    virtual double copy_rate() = 0;
};

// The implementation registered for a device; null if there is none. `backend` must outlive the result.
std::unique_ptr<StepBackend> make_step_backend(ggml_backend_t backend);
// Whether make_step_backend() has one for the device.
bool has_step_backend(ggml_backend_dev_t device);

// Adds one for the devices of a ggml backend besides those built in, by the name of ggml's registry of its
// devices ("CUDA"). Throws Error(argument) if there is one. Not thread-safe.
using MakeStepBackend = std::unique_ptr<StepBackend> (*)(ggml_backend_t backend);
void register_step_backend(const std::string& ggml_backend, MakeStepBackend make);

// The implementations. That of the host is the reference, on the CPU, warp by warp and lane by lane: tests
// the arithmetic without a GPU.
std::unique_ptr<StepBackend> make_host_step_backend(ggml_backend_t backend = nullptr);
#if defined(PYDIFFUSION_CUDA)
std::unique_ptr<StepBackend> make_cuda_step_backend(ggml_backend_t backend);
#endif

}  // namespace pydiffusion
