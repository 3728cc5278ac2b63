// Tile GEMM: bfloat16 tiles multiplied with AMX or AVX-512 BF16.
//
// Weights and activations are packed in bfloat16 tiles of 1 KiB:
//   weights: 16 rows x 32 elements, row-major;
//   activations: 16 pairs of elements x 16 activations, the two elements of a pair adjacent.
// The product of two tiles is added to an accumulator tile of 16 rows x 16 activations in float32.
#pragma once

#include <cstdint>

#include "util/cpu_kernels.h"

namespace pydiffusion {
namespace gemm {

constexpr int64_t kTileRows = 16;   // rows of weights, or activations, in a tile
constexpr int64_t kTileDepth = 32;  // elements of each row or activation
inline int64_t depth_of(int64_t n) { return (n + kTileDepth - 1) / kTileDepth; }  // tiles of n elements
constexpr int64_t kTileElements = 512;                                            // bfloat16 elements
constexpr int64_t kAccumulatorElements = 256;                                     // float32 elements

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
