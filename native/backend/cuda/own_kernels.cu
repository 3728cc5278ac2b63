#include <algorithm>
#include <mutex>
#include <vector>

#include "backend/cuda/own_kernels.cuh"
#include "backend/own_kernels.h"
#include "ggml-backend-impl.h"

namespace pydiffusion {

namespace {

// With fewer blocks on a multiprocessor, as with 100 KB of shared memory, the speed of expert matmuls has not
// been measured.
constexpr int kMinBlocks = 2;

std::mutex users_mutex;
std::vector<const ggml_backend_cuda_context*> users;

bool multiply_if_used(ggml_backend_cuda_context& ctx, const ggml_tensor* weights, const ggml_tensor* x,
                      const ggml_tensor* ids, ggml_tensor* dst) {
    {
        const std::lock_guard<std::mutex> lock(users_mutex);
        if (std::find(users.begin(), users.end(), &ctx) == users.end()) return false;
    }
    return multiply_experts(ctx, weights, x, ids, dst);
}

}  // namespace

std::shared_ptr<void> use_own_kernels(ggml_backend_t backend, bool wherever_possible) {
    auto* ctx = static_cast<ggml_backend_cuda_context*>(backend->context);
    ggml_cuda_set_device(ctx->device);
    if (!can_multiply_experts(ctx->device, wherever_possible ? 1 : kMinBlocks)) return nullptr;
    ggml_cuda_expert_matmul_hook = multiply_if_used;
    ggml_cuda_custom_hook = compute_custom_node;  // only graphs that want them have such nodes
    std::shared_ptr<void> user(ctx, [](void* gone) {
        const std::lock_guard<std::mutex> lock(users_mutex);
        users.erase(std::remove(users.begin(), users.end(), gone), users.end());
    });
    const std::lock_guard<std::mutex> lock(users_mutex);
    users.push_back(ctx);
    return user;
}

}  // namespace pydiffusion
