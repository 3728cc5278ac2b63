// Limits shared by model, graph and runtime.
#pragma once

#include <algorithm>
#include <cstdint>

#include "model/hparams.h"

namespace pydiffusion {

constexpr int32_t kEncodeChunk = 512;  // prompt tokens per graph

// Most tokens that one graph appends to a cache, other than a longer image: a chunk of the prompt, or a
// canvas.
inline int32_t max_batch(const Hparams& hparams) { return std::max(kEncodeChunk, hparams.canvas_length); }

}  // namespace pydiffusion
