// Results of a custom node behind one another in its memory, of several types: views of its parts. The
// allocator keeps all of them until the last view has been read.
#pragma once

#include <cstdint>

#include "ggml.h"

namespace pydiffusion {

// Where a part may begin after one of n_bytes from `begin` on.
inline int64_t after_part(int64_t begin, int64_t n_bytes) { return GGML_PAD(begin + n_bytes, int64_t{256}); }

// Rows of `row` bytes that hold n_bytes.
inline int64_t rows_for(int64_t n_bytes, int64_t row) { return (n_bytes + row - 1) / row; }

// The part from a byte on as dense rows [ne0, ne1], of a multiple of 4 bytes; the node has elements of 4
// bytes.
inline ggml_tensor* view_part(ggml_context* ctx, ggml_tensor* node, int64_t begin, ggml_type type,
                              int64_t ne0, int64_t ne1) {
    const size_t row_bytes = ggml_row_size(type, ne0);
    ggml_tensor* part = ggml_view_1d(ctx, node, static_cast<int64_t>(row_bytes) * ne1 / 4, begin);
    part->type = type;
    part->ne[0] = ne0;
    part->ne[1] = ne1;
    part->nb[0] = ggml_type_size(type);
    part->nb[1] = row_bytes;
    part->nb[2] = part->nb[3] = row_bytes * ne1;
    return part;
}

}  // namespace pydiffusion
