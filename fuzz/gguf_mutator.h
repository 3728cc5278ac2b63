// Feedback from a fuzz target to the mutator.
#pragma once

#include <cstddef>
#include <cstdint>

// Records an input that passed all checks. Most later mutations start from one of these, since an input that
// is already broken never reaches the later checks.
void remember_good(const uint8_t* data, size_t size);
