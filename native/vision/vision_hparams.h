// Hyperparameters of a vision tower, from the metadata of its file (mmproj).
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "gguf/gguf_file.h"

namespace pydiffusion {

// Channels of a pixel.
constexpr int32_t kChannels = 3;
// Of an image.
constexpr int64_t kMaxPatches = int64_t{1} << 17, kMaxPixels = int64_t{1} << 26;
// Of an image, whatever is asked for: the most that towers are trained with, which device plans count on.
constexpr int32_t kMaxSoftTokens = 1120;

struct VisionHparams {
    // Throws if a key is missing or invalid, or asks for something that is not implemented.
    explicit VisionHparams(const GgufFile& file);

    std::string name;  // "" if the file has none
    int32_t n_layer;
    int32_t n_embd;
    int32_t n_ff;
    int32_t n_head;
    int32_t head_dim;
    int32_t patch_size;       // pixels of a side
    int32_t pooling;          // patches of a side that become one soft token
    int32_t n_positions;      // of each axis
    int32_t max_soft_tokens;  // of an image, unless asked otherwise
    int32_t projection_dim;   // n_embd of the text model
    float rms_eps;
    float rope_theta;
    std::array<float, kChannels> mean, std;  // of the channels, by which pixels of 0 to 1 are normalized
    bool standardize;
    bool clipped;  // whether any matrix has bounds

    // Throws unless the text model's embeddings have this many elements.
    void require_size(const GgufFile& file, int32_t n_embd_of_text) const;

    int64_t patch_elements() const { return int64_t{kChannels} * patch_size * patch_size; }
    int64_t pooled_patches() const { return int64_t{pooling} * pooling; }
    bool normalizes() const;  // whether mean and std change a pixel
};

}  // namespace pydiffusion
