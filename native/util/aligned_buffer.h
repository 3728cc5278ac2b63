// Buffers aligned to a cache line: a tile row that crosses two lines takes twice as long to load.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace pydiffusion {
namespace gemm {

constexpr size_t kCacheLine = 64;

struct FreeAligned {
    void operator()(void* p) const { std::free(p); }
};

template <typename T>
using AlignedBuffer = std::unique_ptr<T[], FreeAligned>;

// Uninitialized.
template <typename T>
AlignedBuffer<T> allocate(int64_t n) {
    void* p = std::aligned_alloc(kCacheLine, (n * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine);
    if (!p) throw std::bad_alloc();
    return AlignedBuffer<T>(static_cast<T*>(p));
}

template <typename T>
T* align(T* p) {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(p) + kCacheLine - 1) / kCacheLine * kCacheLine);
}

}  // namespace gemm
}  // namespace pydiffusion
