// Invariants of a GgufFile that opened without an error.
#pragma once

#include "gguf/gguf_file.h"

// Like assert(), but also in release builds.
void require(bool ok);

// Aborts unless every key is found, every tensor is inside its part and no two tensors of a part overlap.
void check_file(const pydiffusion::GgufFile& file);
