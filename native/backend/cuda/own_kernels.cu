#include <map>
#include <mutex>

#include "backend/cuda/own_kernels.cuh"
#include "backend/own_kernels.h"
#include "backend/repacked_weights.h"
#include "ggml-backend-impl.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

// With fewer blocks on a multiprocessor, as with 100 KB of shared memory, the speed of expert matmuls has not
// been measured.
constexpr int kMinBlocks = 2;

// Of an expert matmul that the program may ask for: 8 experts of 4,096 tokens.
constexpr int64_t kMaxSlots = 32768;

std::mutex users_mutex;
std::map<const ggml_backend_cuda_context*, SideStream*> users;

}  // namespace

int compute_capability(ggml_backend_dev_t gpu) {
    ggml_backend_reg_t all = ggml_backend_dev_backend_reg(gpu);
    for (int i = 0; i < ggml_cuda_info().device_count; ++i) {
        if (ggml_backend_reg_dev_get(all, i) == gpu) return ggml_cuda_info().devices[i].cc;
    }
    return 0;
}

namespace {

// Errors here are of a GPU without room, for which ggml's checks would end the process.
void require(bool done, const char* what) {
    if (done) return;
    (void)cudaGetLastError();
    throw Error(ErrorKind::out_of_memory, format("out of GPU memory: %s failed", what));
}

constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // as ggml's handles have on Hopper

}  // namespace

SideStream::SideStream(bool repacks_experts, bool attends)
    : repacks_experts_(repacks_experts), attends_(attends) {}

void SideStream::create() {
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking) == cudaSuccess, "creating a stream");
    for (cudaEvent_t* event : {&begin_, &end_})
        require(cudaEventCreateWithFlags(event, cudaEventDisableTiming) == cudaSuccess, "creating an event");
    require(cublasCreate(&cublas_) == CUBLAS_STATUS_SUCCESS, "creating a cuBLAS handle");
    // Else cuBLAS allocates one while a CUDA graph is captured.
    require(cudaMalloc(&workspace_, kWorkspaceBytes) == cudaSuccess, "allocating cuBLAS's work area");
    require(cublasSetStream(cublas_, stream_) == CUBLAS_STATUS_SUCCESS &&
                cublasSetWorkspace(cublas_, workspace_, kWorkspaceBytes) == CUBLAS_STATUS_SUCCESS,
            "setting up cuBLAS");
}

SideStream::~SideStream() {
    if (cublas_) cublasDestroy(cublas_);
    cudaFree(workspace_);
    if (end_) cudaEventDestroy(end_);
    if (begin_) cudaEventDestroy(begin_);
    if (stream_) cudaStreamDestroy(stream_);
}

void SideStream::begin(cudaStream_t main) {
    CUDA_CHECK(cudaEventRecord(begin_, main));
    CUDA_CHECK(cudaStreamWaitEvent(stream_, begin_, 0));
}

void SideStream::finish(cudaStream_t main) {
    CUDA_CHECK(cudaEventRecord(end_, stream_));
    is_pending_ = true;
    if (in_turn_) join(main);
}

void SideStream::join(cudaStream_t main) {
    if (is_pending_) CUDA_CHECK(cudaStreamWaitEvent(main, end_, 0));
    is_pending_ = false;
}

SideStream* side_stream_of(const ggml_backend_cuda_context* ctx) {
    const std::lock_guard<std::mutex> lock(users_mutex);
    const auto user = users.find(ctx);
    return user == users.end() ? nullptr : user->second;
}

bool repacks_experts(const void* kernels, const ggml_tensor* weights) {
    return static_cast<const SideStream*>(kernels)->repacks_experts() &&
           can_repack(weights->type, weights->ne[1], weights->ne[0]) && fits_repacked(weights, kMaxSlots);
}

bool has_attention(const void* kernels) { return static_cast<const SideStream*>(kernels)->attends(); }

void compute_in_turn(void* kernels, bool in_turn) { static_cast<SideStream*>(kernels)->set_in_turn(in_turn); }

std::shared_ptr<void> use_own_kernels(ggml_backend_t backend, bool wherever_possible) {
    auto* ctx = static_cast<ggml_backend_cuda_context*>(backend->context);
    ggml_cuda_set_device(ctx->device);
    if (!can_run_expert_matmuls(ctx->device, wherever_possible ? 1 : kMinBlocks)) return nullptr;
    ggml_cuda_custom_hook = compute_custom_node;  // only graphs that want them have such nodes
    const std::shared_ptr<SideStream> side(
        new SideStream(can_run_repacked_matmuls(ctx->device), can_run_attention(ctx->device)),
        [ctx](SideStream* gone) {
            {
                const std::lock_guard<std::mutex> lock(users_mutex);
                users.erase(ctx);
            }
            ggml_cuda_set_device(ctx->device);
            delete gone;
        });
    side->create();
    const std::lock_guard<std::mutex> lock(users_mutex);
    users[ctx] = side.get();
    return side;
}

}  // namespace pydiffusion
