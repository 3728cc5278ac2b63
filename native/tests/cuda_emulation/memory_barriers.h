// Barriers in shared memory (mbarrier) of the running block, and bulk copies, whose bytes they wait for.
#pragma once

#include "cuda_emulation/emulate.h"

namespace pydiffusion::emulation {

void init_memory_barrier(const void* barrier, int n, const Site& site);
void arrive_at_memory_barrier(const void* barrier, int n_bytes, const Site& site);
void add_bulk_copy(const Copy& copy, const void* barrier, const Site& site);

// Begins a wait for a phase. True: its copies are to be done, which take_bulk_copy() gives until it returns
// false; then end_memory_wait() ends the phase.
bool begin_memory_wait(const void* barrier, uint32_t phase, const Site& site);
bool take_bulk_copy(const void* barrier, Copy& copy);
void end_memory_wait(const void* barrier, const Site& site);

// Forgets the barriers of the last block. False if nobody has waited for some of its copies.
bool reset_memory_barriers();

}  // namespace pydiffusion::emulation
