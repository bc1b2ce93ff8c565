// Matrices of a batch into the lanes of vectors and back: lane l of a group holds matrix `first + l`.
#pragma once

#include "lanes.h"

namespace kd::KD_ISA {

// Which lanes of two rows, `apart` from each other, the step of a transposition takes. Constants in memory: the
// compiler does not see that a vector that is filled lane by lane is one, and would fill it for every use.
template <class T, int apart>
struct Exchange {
  Word<T> low[kLanes<T>], high[kLanes<T>];

  constexpr Exchange() : low{}, high{} {
    constexpr int L = kLanes<T>;
    for (int l = 0; l < L; ++l) {
      low[l] = static_cast<Word<T>>(l & apart ? L + l - apart : l);
      high[l] = static_cast<Word<T>>(l & apart ? L + l : l + apart);
    }
  }
};
template <class T, int apart>
inline constexpr Exchange<T, apart> kExchange;

// Transposes L vectors of L lanes: block by block, then within blocks.
template <class T, int apart = kLanes<T> / 2>
inline void transpose_lanes(Vector<T>* rows) {
  Mask<T> low, high;
  __builtin_memcpy(&low, kExchange<T, apart>.low, sizeof low);
  __builtin_memcpy(&high, kExchange<T, apart>.high, sizeof high);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & apart) continue;
    const Vector<T> a = rows[i], b = rows[i + apart];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + apart] = __builtin_shuffle(a, b, high);
  }
  if constexpr (apart > 1) transpose_lanes<T, apart / 2>(rows);
}

// The matrices of one lane group, `valid` of them, each `stride` reals from the one before.
template <class T>
struct Group {
  T* data;
  int64_t stride;
  int valid;

  Group(const View& view, int64_t group)
      : data(static_cast<T*>(view.data) + group * kLanes<T> * view.row_stride),
        stride(view.row_stride),
        valid(static_cast<int>(min<int64_t>(kLanes<T>, view.rows - group * kLanes<T>))) {}

  // f(k, vector of the k-th reals from `offset` on) for k in [0, count); 0 in lanes without a matrix.
  template <class F>
  void read(int64_t offset, int64_t count, F&& f) const {
    constexpr int L = kLanes<T>;
    const T* from = data + offset;
    int64_t k = 0;
    if (valid == L)
      for (; k + L <= count; k += L) {
        Vector<T> tile[L];
        for (int l = 0; l < L; ++l) tile[l] = load_vector<T>(from + l * stride + k);
        transpose_lanes<T>(tile);
        for (int u = 0; u < L; ++u) f(k + u, tile[u]);
      }
    for (; k < count; ++k) {
      Vector<T> x{};
      for (int l = 0; l < valid; ++l) x[l] = from[l * stride + k];
      f(k, x);
    }
  }

  // As read(), but what f(k) returns is written.
  template <class F>
  void write(int64_t offset, int64_t count, F&& f) const {
    constexpr int L = kLanes<T>;
    T* to = data + offset;
    int64_t k = 0;
    if (valid == L)
      for (; k + L <= count; k += L) {
        Vector<T> tile[L];
        for (int u = 0; u < L; ++u) tile[u] = f(k + u);
        transpose_lanes<T>(tile);
        for (int l = 0; l < L; ++l) *reinterpret_cast<UnalignedVector<T>*>(to + l * stride + k) = tile[l];
      }
    for (; k < count; ++k) {
      const Vector<T> x = f(k);
      for (int l = 0; l < valid; ++l) to[l * stride + k] = x[l];
    }
  }
};

// out[e] = the e-th number of every matrix.
template <class N>
inline void read_numbers(const Group<ScalarOf<N>>& group, int64_t count, N* out) {
  group.read(0, count * N::parts, [&](int64_t k, Vector<ScalarOf<N>> x) { real_part(out, k) = x; });
}

// Row-major (rows, cols) matrices from and to columns that are contiguous and `stride` numbers apart. Zeros have no
// sign when they are written: which one a zero carries may depend on the matrices beside it.
template <class N>
inline void read_columns(const Group<ScalarOf<N>>& group, int64_t rows, int64_t cols, N* A, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    group.read(i * cols * N::parts, cols * N::parts,
               [&](int64_t k, Vector<ScalarOf<N>> x) { real_part(A + (k / N::parts) * stride + i, k % N::parts) = x; });
}
template <class N>
inline void write_columns(const Group<ScalarOf<N>>& group, int64_t rows, int64_t cols, N* A, int64_t stride,
                          Mask<ScalarOf<N>> bad) {
  using T = ScalarOf<N>;
  const Vector<T> nan = broadcast<T>(static_cast<T>(__builtin_nan("")));
  for (int64_t i = 0; i < rows; ++i)
    group.write(i * cols * N::parts, cols * N::parts,
                [&](int64_t k) { return bad ? nan : real_part(A + (k / N::parts) * stride + i, k % N::parts) + 0; });
}

// The adjoint of such columns, (cols, rows).
template <class N>
inline void write_adjoint(const Group<ScalarOf<N>>& group, int64_t rows, int64_t cols, N* A, int64_t stride,
                          Mask<ScalarOf<N>> bad) {
  using T = ScalarOf<N>;
  const Vector<T> nan = broadcast<T>(static_cast<T>(__builtin_nan("")));
  for (int64_t j = 0; j < cols; ++j)
    group.write(j * rows * N::parts, rows * N::parts, [&](int64_t k) {
      const Vector<T> x = real_part(A + j * stride + k / N::parts, k % N::parts);
      return bad ? nan : (k % N::parts ? -x : x) + 0;
    });
}

// Lanes where a number is NaN or Inf.
template <class N>
inline Mask<ScalarOf<N>> not_finite(const N* x, int64_t count) {
  using T = ScalarOf<N>;
  Vector<T> zero{};
  for (int64_t k = 0; k < count * N::parts; ++k) zero += reinterpret_cast<const Vector<T>*>(x)[k] * 0;
  return zero != 0;
}

// The power of two that brings the largest part of x into [lift, 2 lift), or as near as the range of powers lets it; x
// is multiplied by it, and zeroed in `bad` lanes. A lift keeps small parts beside it within the range.
template <class N>
inline Vector<ScalarOf<N>> normalise(N* x, int64_t count, Mask<ScalarOf<N>> bad, ScalarOf<N> lift = 1) {
  using T = ScalarOf<N>;
  const Vector<T> unit = unit_scale<T>(bad ? Vector<T>{} : largest_of(x, count));
  const Vector<T> most = broadcast<T>(1 / Format<T>::smallest), lifted = unit * lift;
  const Vector<T> scale = lifted > most ? most : lifted;
  for (int64_t k = 0; k < count; ++k) x[k] = select(bad, N{}, x[k] * scale);
  return scale;
}

}  // namespace kd::KD_ISA
