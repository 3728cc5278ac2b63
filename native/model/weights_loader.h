// WeightsLoader: creates a ggml tensor for each tensor of a file, after checking its shape against the
// hyperparameters, in the file's mapping or on the device that the plan assigns to it.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "gguf/gguf_file.h"
#include "model/device_plan.h"
#include "model/weights.h"

namespace pydiffusion {

// In ggml's order.
using Shape = std::vector<int64_t>;

class WeightsLoader {
  public:
    WeightsLoader(LoadedTensors& weights, const GgufFile& file, const DevicePlan& device_plan,
                  const Backend& backend);

    bool has(const std::string& name) const { return file_.find_tensor(name) != nullptr; }
    const DevicePlan& device_plan() const { return device_plan_; }

    // Each throws unless the tensor exists with this shape. A matrix may have a scale, F32 [1] or, of
    // experts, [n_expert], which must be finite: "attn_q.scale" beside "attn_q.weight"; names end in
    // ".weight".
    WeightMatrix matrix(const std::string& name, const Shape& shape);
    // Of any number of dimensions, without its scale.
    ggml_tensor* tensor(const std::string& name, const Shape& shape);
    // Null if the matrices of this name have none.
    ggml_tensor* expert_scales(const std::string& name, int64_t n_expert);
    // The matrices of these names and numbers of rows, [d, n], concatenated; null, and they stay apart,
    // unless all of them are BF16 on a device and none has a scale. To be called before matrix() for any of
    // them.
    ggml_tensor* concatenated(int64_t d, const std::vector<std::pair<std::string, int64_t>>& parts);
    // Norms, scales and the router, always F32 in the format.
    ggml_tensor* f32(const std::string& name, const Shape& shape) {
        return f32_on(device_plan_.tensor_device(name), name, shape);
    }
    ggml_tensor* f32_on(int32_t device, const std::string& name, const Shape& shape);
    // Of an F32 tensor that has been created.
    std::vector<float> values(const std::string& name) const;

    // Copies the devices' tensors; to be called after all tensors have been requested. Throws if there are
    // devices and one of `on_device` is not there, because its type is not supported.
    void upload(const std::function<void(double)>& progress, const std::vector<WeightMatrix>& on_device = {});
    // An unknown tensor in a layer, or an unknown scale, means that the model computes something else. Scales
    // of a matrix's activations ("attn_q.input_scale") are for matmuls with 4-bit activations: not used.
    void refuse_unknown_tensors() const;
    // Whether a tensor is such a scale, of a matrix that has been loaded.
    bool is_input_scale(const std::string& name) const;

  private:
    // Uploads up to kWidenedAtOnce weights, from the first-th of the tensor on, as BF16.
    void upload_widened(ggml_tensor* tensor, ggml_type type, const uint8_t* data, int64_t first);
    void allocate_buffer(int32_t device);
    bool can_hold(ggml_type type);
    // A buffer over a file's mapping; null if the file's alignment is too small.
    ggml_backend_buffer_t map(const GgufFile& file);
    const TensorInfo& require(const std::string& name, const Shape& shape);
    const TensorInfo& require_matrix(const std::string& name, const Shape& shape);
    void require_finite(const std::string& name) const;
    ggml_tensor* create(const TensorInfo& info, int32_t wanted);
    void copy(ggml_tensor* tensor, const TensorInfo& info);

    LoadedTensors& weights_;
    const GgufFile& file_;
    const DevicePlan& device_plan_;
    const Backend& backend_;
    std::map<ggml_type, bool> can_hold_;
    std::vector<std::pair<ggml_tensor*, const TensorInfo*>> uploads_;
    std::vector<ggml_backend_buffer_t> mapped_;  // by part
    std::map<std::string, ggml_tensor*> views_;  // by name, into concatenated matrices
    std::vector<ggml_bf16_t> widened_;
    std::vector<uint8_t> repacked_;
};

}  // namespace pydiffusion
