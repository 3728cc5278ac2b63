// What a target may tell the mutator.
#pragma once

#include <cstddef>
#include <cstdint>

// An input that went through everything: from now on most mutations begin with one of these, since what is
// broken already hides what comes later.
void remember_good(const uint8_t* data, size_t size);
