// Tile GEMM: bfloat16 tiles multiplied with AMX or AVX-512 BF16.
//
// Weights and activations are packed in bfloat16 tiles of 1 KiB:
//   weights: 16 rows x 32 elements, row-major;
//   activations: 16 pairs of elements x 16 activations, the two elements of a pair adjacent.
// The product of two tiles is added to an accumulator tile of 16 rows x 16 activations in float32.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

// Compilers that support AMX; kernels are selected at run time by what the CPU supports.
#if defined(__x86_64__) && defined(__linux__) && defined(__clang__) && __clang_major__ >= 12
#define PYDIFFUSION_AMX 1
#define PYDIFFUSION_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#elif defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 11
#define PYDIFFUSION_AMX 1
#define PYDIFFUSION_TARGET_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")))
#endif
#if defined(PYDIFFUSION_AMX)
#define PYDIFFUSION_TARGET_AMX __attribute__((target("avx512f,amx-tile,amx-bf16")))
#endif

namespace pydiffusion {
namespace gemm {

constexpr int64_t kTileRows = 16;              // rows of weights, or activations, in a tile
constexpr int64_t kTileDepth = 32;             // elements of each row or activation
constexpr int64_t kTileElements = 512;         // bfloat16 elements
constexpr int64_t kAccumulatorElements = 256;  // float32 elements

enum class Kernel {
    ggml,         // no tiles: ggml's own matmuls
    avx512_bf16,  // AVX-512 BF16
    amx,          // AMX BF16
};

// "ggml", "avx512-bf16", "amx", or "auto": AMX if the CPU has it, else ggml. (On a CPU with both, AVX-512
// BF16 was faster than ggml's matmuls for some types and far slower for others; CPUs without AMX have not
// been measured.) Throws Error(argument) for other names and for kernels that this CPU does not support.
Kernel kernel_by_name(const std::string& name);
const char* name_of(Kernel kernel);
// Names of the kernels that this CPU supports, the slowest first.
std::vector<std::string> kernel_names();

// Configures the thread for tile_gemm() while it lives: loads and releases the AMX tile configuration.
class KernelScope {
  public:
    explicit KernelScope(Kernel kernel);
    ~KernelScope();
    KernelScope(const KernelScope&) = delete;
    KernelScope& operator=(const KernelScope&) = delete;

  private:
    Kernel kernel_;
};

// accumulators[j][i] += weights[i] activations[j], for n_weights (1 or 2) x n_activations row tiles that are
// `depth` tiles deep: tile d of weights i is at weights + i * weight_stride + d * kTileElements, likewise for
// activations; accumulator (j, i) is at accumulators + (2 * j + i) * kAccumulatorElements. `add` false: =
// instead of +=. Each element is summed in order of depth, independently of the others.
struct TileOperands {
    const uint16_t* weights;
    int64_t weight_stride;
    const uint16_t* activations;
    int64_t activation_stride;
    float* accumulators;
};
void tile_gemm(Kernel kernel, const TileOperands& operands, int64_t n_weights, int64_t n_activations,
               int64_t depth, bool add);

// The same with AMX for operands that are sums of two bfloat16 halves: offsets of the low halves from the
// high ones; 0: no low half. Skips the product of the two low halves.
struct LowHalves {
    int64_t weights, activations;
};
void tile_gemm_split(const TileOperands& operands, const LowHalves& low, int64_t n_weights,
                     int64_t n_activations, int64_t depth, bool add);

}  // namespace gemm
}  // namespace pydiffusion
