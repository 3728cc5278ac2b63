// Deliberate faults, as the emulation asks for them.
#pragma once

#include <string>

#include "cuda_emulation/emulate.h"

namespace pydiffusion::emulation {

std::string base_name(const std::string& path);

// Whether the fault is to be committed at this line; also notes that it could be.
bool is_mutated(Fault fault, const Site& site);

}  // namespace pydiffusion::emulation
