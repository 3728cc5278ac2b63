// Deliberate faults, and the count of ThreadSanitizer's reports.
#pragma once

#include <string>

#include "cuda_emulation/emulate.h"

namespace pydiffusion::emulation {

std::string base_name(const std::string& path);

// Whether the fault is to be committed at this line; also notes that it could be.
bool is_mutated(Fault fault, const Site& site);

// Throws EmulationError if ThreadSanitizer reported a race since the last call.
void throw_if_raced();

}  // namespace pydiffusion::emulation
