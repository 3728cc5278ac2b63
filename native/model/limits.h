// Constants that several layers share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "model/hparams.h"

namespace pydiffusion {

constexpr int32_t kEncodeChunk = 512;  // tokens of a prompt per graph

// Tokens that one graph appends to a cache at most: a chunk of the prompt, or a canvas.
inline int32_t max_batch(const Hparams& hparams) { return std::max(kEncodeChunk, hparams.canvas_length); }

}  // namespace pydiffusion
