// Memory that begins with a cache line: a tile's row that lies across two of them takes twice as long to
// load.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace pydiffusion {
namespace gemm {

constexpr size_t kLine = 64;

struct FreeAligned {
    void operator()(void* p) const { std::free(p); }
};

template <typename T>
using AlignedBuffer = std::unique_ptr<T[], FreeAligned>;

// Not initialised.
template <typename T>
AlignedBuffer<T> allocate(int64_t n) {
    void* p = std::aligned_alloc(kLine, (n * sizeof(T) + kLine - 1) / kLine * kLine);
    if (!p) throw std::bad_alloc();
    return AlignedBuffer<T>(static_cast<T*>(p));
}

template <typename T>
T* align(T* p) {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(p) + kLine - 1) / kLine * kLine);
}

}  // namespace gemm
}  // namespace pydiffusion
