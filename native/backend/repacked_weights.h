// The layout in which kernels for Hopper read quantized weights: a warp's reads are contiguous. Rows are in
// groups of 64, a group in pieces of 256 values of each row ("chunk"), a piece takes as many bytes as the
// rows' blocks; where rows end, the last piece is shorter (Q8_0).
//
// A piece has the fragments of rows 0 to 15 of the group, then those of rows 16 to 31, 32 to 47 and 48 to 63,
// then the heads of all rows. A fragment is 512 bytes, 16 for each lane 4 g + t of a warp: bytes 4 t to
// 4 t + 3 of each of four lines of 16 bytes, which are of rows g and g + 8.
//
// Q4_K: 4 fragments, one for 64 values, of the first and the second 16 bytes of their nibbles in row g, then
// in row g + 8. A row's head: 16 bytes, float16 d and dmin and the scales.
//
// Q6_K: 6 fragments, 3 for 128 values: the four lines of low bits of row g; those of row g + 8; the two lines
// of high bits of row g, then of row g + 8. Heads: 16 bytes of scales for each row, then float16 d of each.
//
// Q8_0: a fragment for 32 values, of the two lines of row g, then of row g + 8. A row's head: its float16
// scales.
#pragma once

#include <cstdint>

#include "ggml.h"

namespace pydiffusion {

constexpr int64_t kRepackedRows = 64;

// Whether weights of this type and shape can be repacked.
bool can_repack(ggml_type type, int64_t n_rows, int64_t n_values);

// Marks a tensor whose data have been repacked: only our kernels can read it.
void mark_repacked(ggml_tensor* tensor);
bool is_repacked(const ggml_tensor* tensor);

// Repacks n_rows rows, a multiple of kRepackedRows. Groups don't depend on each other: threads may share the
// work.
void repack_rows(ggml_type type, const uint8_t* rows, int64_t n_rows, int64_t n_values, uint8_t* out);

}  // namespace pydiffusion
