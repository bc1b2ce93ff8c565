// Householder QR of one lane group: A (rows, cols), rows >= cols, columns contiguous and `stride` apart.
#pragma once

#include "lanes.h"

namespace kd::KD_ISA {

// y −= v (vᴴy) τ over `count` elements.
template <class N>
inline void reflect(const N* v, Vector<ScalarOf<N>> tau, N* y, int64_t count) {
  N even{}, odd{};
  int64_t i = 0;
  for (; i + 1 < count; i += 2) {
    even = add_conj_product(even, v[i], y[i]);
    odd = add_conj_product(odd, v[i + 1], y[i + 1]);
  }
  if (i < count) even = add_conj_product(even, v[i], y[i]);
  const N factor = -((even + odd) * tau);
  for (i = 0; i < count; ++i) y[i] = add_product(y[i], factor, v[i]);
}

// A = Q R with Q = H_0 H_1 …, H_k = I − τ_k v_k v_kᴴ. R above the diagonal stays in A and its diagonal goes to
// `diagonal`; v_k takes the place of A's column k from row k on. Each column is scaled by a power of two before it is
// squared, so rows and columns may fall over many decades.
template <class N>
void householder(N* A, int64_t rows, int64_t cols, int64_t stride, N* diagonal, Vector<ScalarOf<N>>* tau) {
  using T = ScalarOf<N>;
  for (int64_t k = 0; k < cols; ++k) {
    N* v = A + k * stride + k;
    const int64_t count = rows - k;
    if (count == 1) {  // nothing to annihilate
      diagonal[k] = v[0];
      tau[k] = Vector<T>{};
      return;
    }
    const Vector<T> scale = unit_scale<T>(largest_of(v, count));
    Vector<T> tail{};
    for (int64_t i = 0; i < count; ++i) {
      v[i] = v[i] * scale;
      if (i > 0) tail += abs2(v[i]);
    }
    Vector<T> size;
    const N phase = direction(v[0], size);
    const Vector<T> norm = square_root<T>(size * size + tail);
    diagonal[k] = -(phase * (norm / scale));
    v[0] = phase * (size + norm);
    const Vector<T> half = norm * (norm + size);
    tau[k] = half > 0 ? 1 / half : Vector<T>{};
    for (int64_t j = 1; j < cols - k; ++j) reflect(v, tau[k], v + j * stride, count);
  }
}

// B ← Q B for B (rows, count), its columns `stride_B` apart.
template <class N>
void apply_reflectors(const N* A, int64_t rows, int64_t cols, int64_t stride, const Vector<ScalarOf<N>>* tau, N* B,
                      int64_t count, int64_t stride_B) {
  for (int64_t k = cols - 1; k >= 0; --k)
    for (int64_t j = 0; j < count; ++j) reflect(A + k * stride + k, tau[k], B + j * stride_B + k, rows - k);
}

// X = Rᴴ (cols, cols), lower triangular.
template <class N>
void adjoint_of_factor(const N* A, int64_t cols, int64_t stride, const N* diagonal, N* X, int64_t stride_X) {
  for (int64_t k = 0; k < cols; ++k) {
    N* x = X + k * stride_X;
    for (int64_t i = 0; i < k; ++i) x[i] = N{};
    x[k] = conj(diagonal[k]);
    for (int64_t i = k + 1; i < cols; ++i) x[i] = conj(A[i * stride + k]);
  }
}

}  // namespace kd::KD_ISA
