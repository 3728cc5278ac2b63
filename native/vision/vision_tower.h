// VisionTower: turns the patches of an image into soft tokens of a text model.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend/rope_angles.h"
#include "model/model.h"
#include "vision/vision_hparams.h"
#include "vision/vision_weights.h"

namespace pydiffusion {

// A loaded tower; immutable. It computes on the backend of its text model, one image at a time.
class VisionTower {
  public:
    // Throws if the file is not a tower for this model. `progress` is called with the fraction loaded so far,
    // 0 to 1.
    VisionTower(const std::string& path, std::shared_ptr<const Model> model,
                const std::function<void(double)>& progress);

    // Features of an image's soft tokens, [projection_dim, n / pooling^2]: patches [patch_elements(), n] of
    // pixels from 0 to 1, channels side by side; positions, in patches, are a full grid in any order. Calls
    // `between_layers` from time to time, on devices only at first; what it throws ends the call. Threads
    // take turns.
    std::vector<float> encode(const float* patches, const std::vector<AxialPosition>& positions,
                              const std::function<void()>& between_layers) const;

    // Of the matmuls of types that our kernels support; "ggml" on devices.
    const char* kernel_name() const { return gemm::name_of(model_->backend.kernel_for_many()); }

    const std::shared_ptr<const GgufFile> file;
    const VisionHparams hparams;
    const VisionWeights weights;

  private:
    const std::shared_ptr<const Model> model_;
    mutable std::mutex turn_;
};

}  // namespace pydiffusion
