// Cholesky factorisation G = RᵀR of a symmetric matrix (n, n), in place: R in the upper triangle, zeros below.
#pragma once

#include "gemm.h"

namespace kd::KD_ISA {

// Returns min_j R_jj² / G_jj, or 0 as soon as a pivot is not positive (NaN included).
template <class T>
double cholesky(int threads, int64_t n, T* G) {
  constexpr int64_t block = 128;
  Buffer<T> diagonal(n), minus(block);
  for (int64_t j = 0; j < n; ++j) diagonal[j] = G[j * n + j];
  for (int64_t j = 0; j < block; ++j) minus[j] = T(-1);
  double smallest = 1;
  for (int64_t k0 = 0; k0 < n; k0 += block) {
    const int64_t k1 = min(n, k0 + block);
    for (int64_t k = k0; k < k1; ++k) {  // the diagonal block, row by row
      T* row = G + k * n;
      const double ratio = static_cast<double>(row[k]) / static_cast<double>(diagonal[k]);
      if (!(row[k] > 0) || !(ratio > 0)) return 0;
      smallest = min(smallest, ratio);
      const T inverse = T(1) / static_cast<T>(__builtin_sqrt(static_cast<double>(row[k])));
      for (int64_t j = k; j < k1; ++j) row[j] *= inverse;
      for (int64_t i = k + 1; i < k1; ++i)
        for (int64_t j = i; j < k1; ++j) G[i * n + j] -= row[i] * row[j];
    }
    parallel_chunks(threads, n - k1, 64, [&](int64_t begin, int64_t end) {  // the rows right of it
      for (int64_t i = k0; i < k1; ++i) {
        T* row = G + i * n + k1;
        for (int64_t k = k0; k < i; ++k) {
          const T factor = G[k * n + i];
          const T* above = G + k * n + k1;
          for (int64_t j = begin; j < end; ++j) row[j] -= factor * above[j];
        }
        const T inverse = T(1) / G[i * n + i];
        for (int64_t j = begin; j < end; ++j) row[j] *= inverse;
      }
    });
    Operand<T> panel = operand(G + k0 * n + k1, n);
    Operand<T> negative = panel.transposed();
    negative.scale = minus.get();
    gemm(threads, n - k1, n - k1, k1 - k0, negative, panel, G + k1 * n + k1, n, true, {Band::symmetric});
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < i; ++j) G[i * n + j] = T{};
  return smallest;
}

}  // namespace kd::KD_ISA
