// Float32 GEMM micro-kernel for CPU nodes, register-blocked.
#pragma once

#include <cstdint>
#include <cstring>

namespace pydiffusion {
namespace simd {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kVectors = 2, kRows = 8;
#elif defined(__AVX__)
constexpr int kWidth = 8, kVectors = 2, kRows = 4;
#else
constexpr int kWidth = 4, kVectors = 4, kRows = 4;
#endif
constexpr int kLanes = kWidth * kVectors;

#if defined(__GNUC__)
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias));
// One vector at a time: compilers copy several at once through memory.
inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, const Vector& v) { *reinterpret_cast<Unaligned*>(p) = v; }
#else
struct Vector {
    float lane[kWidth];
    Vector& operator+=(const Vector& other) {
        for (int i = 0; i < kWidth; ++i) lane[i] += other.lane[i];
        return *this;
    }
    friend Vector operator*(float a, const Vector& b) {
        Vector result;
        for (int i = 0; i < kWidth; ++i) result.lane[i] = a * b.lane[i];
        return result;
    }
};
inline Vector load(const float* p) {
    Vector v;
    std::memcpy(v.lane, p, sizeof v.lane);
    return v;
}
inline void store(float* p, const Vector& v) { std::memcpy(p, v.lane, sizeof v.lane); }
#endif

// Strided left operand: element (i, j) is data[i * row + j * column].
struct Left {
    const float* data;
    int64_t row, column;
};

// c[0..R) += a[0..R) b, for kLanes columns; `stride` is between rows of b and of c.
template <int R>
inline void multiply_add_rows(const Left& a, const float* b, float* c, int64_t stride, int64_t n_inner) {
    Vector sums[R][kVectors];
    for (int i = 0; i < R; ++i) {
        for (int v = 0; v < kVectors; ++v) sums[i][v] = load(c + i * stride + v * kWidth);
    }
    for (int64_t j = 0; j < n_inner; ++j) {
        Vector right[kVectors];
        for (int v = 0; v < kVectors; ++v) right[v] = load(b + j * stride + v * kWidth);
        for (int i = 0; i < R; ++i) {
            const float left = a.data[i * a.row + j * a.column];
            for (int v = 0; v < kVectors; ++v) sums[i][v] += left * right[v];
        }
    }
    for (int i = 0; i < R; ++i) {
        for (int v = 0; v < kVectors; ++v) store(c + i * stride + v * kWidth, sums[i][v]);
    }
}

// c [n_rows][n_lanes] += a b, with b [n_inner][n_lanes] and n_lanes a multiple of kLanes. Each element of c
// is summed in the order of b's rows, independently of its neighbours.
inline void multiply_add(const Left& a, const float* b, float* c, int64_t n_rows, int64_t n_inner,
                         int64_t n_lanes) {
    for (int64_t lane = 0; lane < n_lanes; lane += kLanes) {
        int64_t i = 0;
        for (; i + kRows <= n_rows; i += kRows)
            multiply_add_rows<kRows>({a.data + i * a.row, a.row, a.column}, b + lane, c + i * n_lanes + lane,
                                     n_lanes, n_inner);
        for (; i < n_rows; ++i)
            multiply_add_rows<1>({a.data + i * a.row, a.row, a.column}, b + lane, c + i * n_lanes + lane,
                                 n_lanes, n_inner);
    }
}

}  // namespace simd
}  // namespace pydiffusion
