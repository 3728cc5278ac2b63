// Phases: a graph as a list of pieces of work, for threads that take whichever piece is next.
#pragma once

#include <vector>

#include "ggml-cpu.h"

namespace pydiffusion {

// Into how many pieces a phase is split: one; one per thread; several per thread; or one per thread of the
// plan, however many work, for nodes whose result depends on the number in the last bits.
enum class Split { none, by_thread, finely, as_planned };

// A node of a graph, or the part of it between two of its barriers. Its pieces may be computed by any thread,
// in any order or at once, when the phases before it are complete. No result depends on who computed what.
struct Phase {
    ggml_tensor* node;
    int stage;  // 0: the whole node; else one of ggml's stages, see vendor/patches/0002
    Split split;
};

// Phases of a graph, in order.
std::vector<Phase> phases_of(ggml_cgraph* graph);

// The stages of a node must have the same number.
int n_pieces_of(const Phase& phase, int n_threads, const ggml_cplan& plan);

// Before a phase's first piece, by one thread.
void begin_phase(const ggml_cplan& plan, int n_pieces);
void compute_piece(const Phase& phase, const ggml_cplan& plan, int piece, int n_pieces);

}  // namespace pydiffusion
