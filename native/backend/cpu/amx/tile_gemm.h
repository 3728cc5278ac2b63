// Matmul of 16-bit tiles: what the processor's matrix units, or its vectors, multiply at a time.
//
// Weights and activations (a token's numbers) are laid out in tiles of bfloat16, 1 KiB each:
//   weights: 16 rows x 32 numbers, row by row;
//   activations: 16 pairs of numbers x 16 activations, the two numbers of a pair side by side.
// A product of two is added to a tile of 16 rows x 16 activations of float32.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

// Compilers that know AMX; what is compiled for processors that have it is chosen when the program runs.
#if defined(__x86_64__) && defined(__linux__) && defined(__clang__) && __clang_major__ >= 12
#define PYDIFFUSION_TILES 1
#define PYDIFFUSION_VECTORS_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#elif defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 11
#define PYDIFFUSION_TILES 1
#define PYDIFFUSION_VECTORS_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")))
#endif
#if defined(PYDIFFUSION_TILES)
#define PYDIFFUSION_TILES_TARGET __attribute__((target("avx512f,amx-tile,amx-bf16")))
#endif

namespace pydiffusion {
namespace gemm {

constexpr int64_t kTileRows = 16;       // of weights, and activations, in a tile
constexpr int64_t kTileDepth = 32;      // numbers of each row
constexpr int64_t kTileElements = 512;  // bfloat16 numbers of a tile; its product has 256 of float32
constexpr int64_t kAccumulatorElements = 256;

enum class Kernel {
    ggml,         // no tiles: ggml's own products
    avx512_bf16,  // AVX-512 BF16
    amx,          // AMX BF16
};

// "ggml", "avx512-bf16", "amx", or "auto": AMX where it is, else ggml's. (On a processor with both, AVX-512
// BF16 was faster than ggml's products for some types and far slower for others; which on those without AMX
// has not been measured.) Throws Error(argument) for other names and for what this processor has not.
Kernel kernel_by_name(const std::string& name);
const char* name_of(Kernel kernel);
// The names of what this processor has, the slowest first.
std::vector<std::string> kernel_names();

// Makes the thread ready for multiply(), and takes back what that changed.
class KernelScope {
  public:
    explicit KernelScope(Kernel kernel);
    ~KernelScope();
    KernelScope(const KernelScope&) = delete;
    KernelScope& operator=(const KernelScope&) = delete;

  private:
    Kernel kernel_;
};

// products[j][i] += weights[i] activations[j], for n_weights (1 or 2) by n_activations tiles that are `depth`
// tiles deep: tile d of weights i stands at weights + i * weight_stride + d * kTileElements, likewise
// activations; tile (j, i) of the products at products + (2 * j + i) * kAccumulatorElements. `add` false: =
// instead of +=. Each number is summed up in the order of depth, whatever else is computed.
struct TileOperands {
    const uint16_t* weights;
    int64_t weight_stride;
    const uint16_t* activations;
    int64_t activation_stride;
    float* accumulators;
};
void tile_gemm(Kernel kernel, const TileOperands& operands, int64_t n_weights, int64_t n_activations,
               int64_t depth, bool add);

// Likewise, with AMX, for numbers that are sums of two bfloat16 ones: the low halves lie at these distances
// from the high ones, 0 where there are none. The product of two low halves is left out.
struct LowHalves {
    int64_t weights, activations;
};
void tile_gemm_split(const TileOperands& operands, const LowHalves& low, int64_t n_weights,
                     int64_t n_activations, int64_t depth, bool add);

}  // namespace gemm
}  // namespace pydiffusion
