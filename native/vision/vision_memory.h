// Memory that a vision tower takes on the device that holds it.
#pragma once

#include <cstdint>

#include "ggml-backend.h"
#include "gguf/gguf_file.h"
#include "vision/vision_hparams.h"

namespace pydiffusion {

// In bytes. weights: in the file's types. work: while it encodes an image of max_soft_tokens, an estimate;
// nothing is kept between images.
struct VisionMemory {
    uint64_t weights = 0, work = 0;
};

// type: of the device's buffers, which may pad tensors.
VisionMemory vision_memory(const GgufFile& file, const VisionHparams& hparams,
                           ggml_backend_buffer_type_t type);

}  // namespace pydiffusion
