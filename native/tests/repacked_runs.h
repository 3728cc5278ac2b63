// Runs of the repacked matmul on the emulated GPU.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "backend/cuda/repacked_matmul_kernels.cuh"
#include "backend/repacked_weights.h"
#include "cuda_emulation/emulate.h"
#include "expert_cases.h"
#include "quantized.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

// Repacked weights, packed x and grouped slots, as a matmul in tiles T takes them; starts_early: as the
// kernel's. Its results are to be named in `arguments`.
template <typename T>
class RepackedRun {
  public:
    RepackedRun(ggml_type type, const ExpertCase& c, const std::vector<uint8_t>& weights,
                const std::vector<float>& x, const std::vector<int32_t>& ids, emulation::Order order)
        : order_(order),
          weights_(weights.size()),
          x_(static_cast<size_t>(c.n_x()) * c.n_chunks() * cuda::kXChunkBytes),
          x_scale_(c.n_x()),
          slots_(c.n_slots()),
          n_tiles_(1),
          launch_(cuda::repacked_launch_of<T>(c.n_rows, c.n_experts, c.n_slots())),
          tiles_(launch_.n_tiles, cuda::SlotTile{-1, -1, -1}) {
        using namespace cuda;
        REQUIRE(can_repack(type, c.n_rows, c.n_values));
        repack_rows(type, weights.data(), int64_t{c.n_experts} * c.n_rows, c.n_values, weights_.data.get());
        emulation::emulate(dim3(c.n_x()), kPackThreads, 0, order, [&] {
            pack_rows<PackOrder::even_odd>(PlainRows{x.data(), c.n_values}, c.n_values, c.n_chunks(),
                                           x_.data.get(), x_scale_.data());
        });
        emulation::emulate(dim3(1), kGroupThreads, 0, order, [&] {
            group_slots(ids.data(), c.n_used, c.n_used, c.n_tokens, c.n_experts, T::kSlots, slots_.data(),
                        tiles_.data(), n_tiles_.data());
        });
        CHECK(n_tiles_[0] <= launch_.n_tiles);
        const auto row_bytes = static_cast<int32_t>(weights.size() / (c.n_experts * c.n_rows));
        arguments = {weights_.data.get(),
                     int64_t{row_bytes} * c.n_rows,
                     64 * row_bytes,
                     c.n_rows / 64,
                     c.n_values,
                     c.n_chunks(),
                     x_.data.get(),
                     x_scale_.data(),
                     nullptr,
                     slots_.data(),
                     tiles_.data(),
                     n_tiles_.data(),
                     c.per_token ? c.n_used : 1};
    }

    template <bool starts_early = false>
    void multiply() {
        const dim3 grid(static_cast<unsigned>(launch_.n_row_blocks), static_cast<unsigned>(launch_.n_tiles));
        emulation::emulate(grid, T::kThreads, T::kSharedBytes, order_,
                           [&] { cuda::repacked_matmul<T, starts_early>(arguments); });
    }

    cuda::RepackedArguments arguments;

  private:
    emulation::Order order_;
    DeviceMemory weights_, x_;
    std::vector<float> x_scale_;
    std::vector<int32_t> slots_, n_tiles_;
    cuda::RepackedLaunch launch_;
    std::vector<cuda::SlotTile> tiles_;
};

// [slot][row]; NaN where nothing was written
template <typename T, bool starts_early = false>
std::vector<float> run(ggml_type type, const ExpertCase& c, const std::vector<uint8_t>& weights,
                       const std::vector<float>& x, const std::vector<int32_t>& ids, emulation::Order order) {
    RepackedRun<T> run(type, c, weights, x, ids, order);
    std::vector<float> y(static_cast<size_t>(c.n_slots()) * c.n_rows, NAN);
    run.arguments.y = y.data();
    run.template multiply<starts_early>();
    return y;
}

}  // namespace testing
}  // namespace pydiffusion
