#include "vision/vision_tower.h"

#include <algorithm>
#include <cmath>

#include "util/error.h"
#include "vision/vision_graph.h"

namespace pydiffusion {

namespace {

// Columns and rows of patches.
struct Grid {
    int64_t width = 0, height = 0;
};

Grid grid_of(const std::vector<AxialPosition>& positions, const VisionHparams& hp) {
    const auto n = static_cast<int64_t>(positions.size());
    if (n < 1 || n > kMaxPatches)
        throw Error(ErrorKind::argument,
                    format("%lld patches; an image has 1 to %lld", static_cast<long long>(n),
                           static_cast<long long>(kMaxPatches)));
    Grid grid;
    for (const AxialPosition& p : positions) {
        if (p.x < 0 || p.y < 0 || p.x >= hp.n_positions || p.y >= hp.n_positions)
            throw Error(ErrorKind::argument, format("a patch is at (%d, %d); positions are 0 to %d", p.x, p.y,
                                                    hp.n_positions - 1));
        grid.width = std::max<int64_t>(grid.width, p.x + 1);
        grid.height = std::max<int64_t>(grid.height, p.y + 1);
    }
    if (grid.width * grid.height != n || grid.width % hp.pooling != 0 || grid.height % hp.pooling != 0)
        throw Error(ErrorKind::argument,
                    format("%lld patches up to column %lld and row %lld are no full grid whose sides are "
                           "multiples of %d",
                           static_cast<long long>(n), static_cast<long long>(grid.width - 1),
                           static_cast<long long>(grid.height - 1), hp.pooling));
    std::vector<bool> seen(n);
    for (const AxialPosition& p : positions) {
        if (seen[p.y * grid.width + p.x])
            throw Error(ErrorKind::argument, format("two patches are at (%d, %d)", p.x, p.y));
        seen[p.y * grid.width + p.x] = true;
    }
    return grid;
}

// Pixels as the tower's convolution takes them: normalized, from -1 to 1, a plane per channel.
std::vector<float> prepare_patches(const float* patches, int64_t n, const VisionHparams& hp) {
    const int64_t n_pixels = int64_t{hp.patch_size} * hp.patch_size;
    const bool normalizes = hp.normalizes();
    std::vector<float> planes(n * n_pixels * kChannels);
    for (int64_t i = 0; i < n; ++i) {
        const float* from = patches + i * n_pixels * kChannels;
        float* to = planes.data() + i * n_pixels * kChannels;
        for (int64_t pixel = 0; pixel < n_pixels; ++pixel) {
            for (int32_t c = 0; c < kChannels; ++c) {
                float value = from[pixel * kChannels + c];
                if (normalizes) value = (value - hp.mean[c]) / hp.std[c];
                to[c * n_pixels + pixel] = 2.0f * (value - 0.5f);
            }
        }
    }
    return planes;
}

// Means over squares of patches, times sqrt(d): [d, n] -> [d, n / pooling^2], in rows. Without pooling, soft
// tokens stay in the order of the patches.
std::vector<float> pool(const std::vector<float>& x, const std::vector<AxialPosition>& positions,
                        const Grid& grid, const VisionHparams& hp) {
    const int64_t d = hp.n_embd, columns = grid.width / hp.pooling;
    const auto n = static_cast<int64_t>(positions.size());
    std::vector<float> pooled(d * (n / hp.pooled_patches()));
    const float share = 1.0f / static_cast<float>(hp.pooled_patches());
    for (int64_t i = 0; i < n; ++i) {
        const int64_t at =
            hp.pooling == 1 ? i : positions[i].y / hp.pooling * columns + positions[i].x / hp.pooling;
        const float* from = x.data() + i * d;
        float* to = pooled.data() + at * d;
        for (int64_t j = 0; j < d; ++j) to[j] += from[j] * share;
    }
    const float scale = std::sqrt(static_cast<float>(d));
    for (float& value : pooled) value *= scale;
    return pooled;
}

// Standardizes, if the tower does, and applies the RMS norm without weights.
void normalize(std::vector<float>& features, const VisionHparams& hp, const VisionWeights& w) {
    const int64_t d = hp.n_embd;
    for (float* row = features.data(); row != features.data() + features.size(); row += d) {
        double squares = 0.0;
        for (int64_t j = 0; j < d; ++j) {
            if (hp.standardize) row[j] = (row[j] - w.std_bias[j]) * w.std_scale[j];
            squares += static_cast<double>(row[j]) * row[j];
        }
        const float mean = static_cast<float>(squares / static_cast<double>(d));
        const float scale = 1.0f / std::sqrt(mean + hp.rms_eps);
        for (int64_t j = 0; j < d; ++j) row[j] *= scale;
    }
}

VisionHparams read_hparams(const GgufFile& file, const Model& model) {
    VisionHparams hp(file);
    hp.require_size(file, model.hparams.n_embd);
    return hp;
}

}  // namespace

VisionTower::VisionTower(const std::string& path, std::shared_ptr<const Model> model,
                         const std::function<void(double)>& progress)
    : file(GgufFile::open_all_parts(path)),
      hparams(read_hparams(*file, *model)),
      weights(file, hparams, model->device_plan, model->backend, progress),
      model_(std::move(model)) {
    if (!model_->backend.on_device()) read_into_memory(*file, progress);
}

std::vector<float> VisionTower::encode(const float* patches, const std::vector<AxialPosition>& positions,
                                       const std::function<void()>& between_layers) const {
    const Grid grid = grid_of(positions, hparams);
    const auto n = static_cast<int64_t>(positions.size());
    // On the CPU a layer takes long enough to be a graph by itself. On devices, which other threads wait for,
    // what the caller does in between must not hold them up.
    const bool on_device = model_->backend.on_device();
    const size_t n_at_once = on_device ? weights.layers.size() : 1;
    if (on_device) between_layers();
    const std::lock_guard<std::mutex> turn(turn_);
    const auto lock = model_->backend.lock_devices();
    file->require_not_truncated();
    GraphExecutor executor(model_->backend);
    const auto compute = [&](int64_t n_tokens, int64_t n0, const std::vector<float>& values,
                             const auto& build) {
        VisionGraph graph(*model_, hparams, weights, n_tokens);
        ggml_tensor* input = graph.new_input(n0);
        return graph.compute(executor, build(graph, input), input, values, positions);
    };

    std::vector<float> x = compute(n, hparams.patch_elements(), prepare_patches(patches, n, hparams),
                                   [](VisionGraph& graph, ggml_tensor* input) { return graph.embed(input); });
    for (size_t i = 0; i < weights.layers.size(); i += n_at_once) {
        if (!on_device) between_layers();
        x = compute(n, hparams.n_embd, x, [&](VisionGraph& graph, ggml_tensor* input) {
            for (size_t j = i; j < i + n_at_once; ++j) input = graph.layer(weights.layers[j], input);
            return input;
        });
    }
    std::vector<float> features = pool(x, positions, grid, hparams);
    normalize(features, hparams, weights);
    features = compute(n / hparams.pooled_patches(), hparams.n_embd, features,
                       [](VisionGraph& graph, ggml_tensor* input) { return graph.project(input); });
    if (!std::all_of(features.begin(), features.end(), [](float value) { return std::isfinite(value); }))
        throw Error(ErrorKind::general, file->path() +
                                            ": the features of this image are NaN or infinite: "
                                            "its pixels or the weights are damaged");
    return features;
}

}  // namespace pydiffusion
