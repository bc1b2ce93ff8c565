// What one-sided Jacobi leaves, sorted: singular values, their order in each lane, and both sets of vectors.
#pragma once

#include "householder.h"
#include "jacobi.h"

namespace kd::KD_ISA {

// Workspace of one lane group's decomposition M = U Σ Vᴴ, M (rows, cols).
template <class N>
struct Decomposition {
  using T = ScalarOf<N>;
  using V = Vector<T>;
  int64_t rows, cols, stride_M, padded, stride_X;
  N *M, *X, *diagonal;
  V *tau, *values;
  Mask<T>*order, *places;
  Column<T>* columns;

  static int64_t padded_rows(int64_t cols) { return round_up(cols, Jacobi<N>::kUnroll); }
  static int64_t column_stride(int64_t cols, bool with_vectors) { return (with_vectors ? 2 : 1) * padded_rows(cols); }
  static Schedule schedule(int64_t cols, bool with_vectors) {
    return Schedule(cols, sizeof(N) * column_stride(cols, with_vectors), Jacobi<N>::kTwos);
  }
  Decomposition(int64_t rows, int64_t cols, bool with_vectors, Workspace<T>& room)
      : rows(rows), cols(cols), stride_M(rows), padded(padded_rows(cols)), stride_X(column_stride(cols, with_vectors)) {
    M = room.template take<N>(rows * cols);
    X = room.template take<N>(stride_X * cols);
    diagonal = room.template take<N>(cols);
    tau = room.template take<V>(cols);
    values = room.template take<V>(cols);
    order = room.template take<Mask<T>>(cols);
    places = room.template take<Mask<T>>(cols);
    columns = room.template take<Column<T>>(cols);
  }

  // In lanes where columns ascend by far, M's columns in descending order: without it QR would bury the small ones
  // under the rounding of the large ones. Returns whether there are such lanes; places[j] is where column j came from.
  bool arrange() {
    Mask<T> ascending{};
    V least = broadcast<T>(Format<T>::largest);
    for (int64_t j = 0; j < cols; ++j) {
      values[j] = largest_of(M + j * stride_M, rows);
      ascending |= values[j] > kLevel * least;
      least = values[j] < least ? values[j] : least;
    }
    if (!any(ascending)) return false;
    for (int64_t j = 0; j < cols; ++j) values[j] = ascending ? values[j] : V{};
    sort();
    for (int64_t j = 0; j < cols; ++j) places[j] = order[j];
    reorder(M, rows, stride_M);
    return true;
  }

  // Rows of V back in the places of M's columns.
  void restore() {
    for (int64_t j = 0; j < cols; ++j) {
      N* x = X + j * stride_X;
      for (int64_t i = 0; i < cols; ++i) diagonal[i] = x[i];
      for (int64_t i = 0; i < cols; ++i)
        for (int part = 0; part < N::parts; ++part)
          for (int l = 0; l < kLanes<T>; ++l) lane(x[places[i][l]], part, l) = lane(diagonal[i], part, l);
    }
  }

  // M is destroyed. Fills `values`, unsorted; with vectors X's columns hold V and, from row `padded` on, J.
  // A second QR, of Rᴴ, saves about half a sweep and costs as much.
  void decompose(const Schedule& schedule, bool with_vectors, bool graded = false) {
    householder(M, rows, cols, stride_M, diagonal, tau);
    adjoint_of_factor(M, cols, stride_M, diagonal, X, stride_X);
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t i = cols; i < stride_X; ++i) {
        const T one = i == padded + j;
        X[j * stride_X + i] = from_real<N>(broadcast<T>(one));
      }
    Jacobi<N> jacobi(X, padded, with_vectors ? padded : 0, cols, stride_X, columns, !with_vectors, graded);
    jacobi.run(schedule);
    for (int64_t j = 0; j < cols; ++j) {
      const V size = square_root<T>(jacobi.norm2(X + j * stride_X));
      values[j] = with_vectors ? columns[j].d * (size / square_root<T>(columns[j].w)) : jacobi.value(j);
      if (with_vectors) normalise_vectors(X + j * stride_X, size, columns[j]);
    }
  }

  // U (rows, cols) = Q [J; 0], columns `stride` apart.
  void left_vectors(N* U, int64_t stride) const {
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t i = 0; i < rows; ++i) U[j * stride + i] = i < cols ? X[j * stride_X + padded + i] : N{};
    apply_reflectors(M, rows, cols, stride_M, tau, U, cols, stride);
  }

  // Values descending in every lane; order[j] is the column that the j-th came from.
  void sort() {
    for (int64_t j = 0; j < cols; ++j) order[j] = whole<T>(j);
    for (int64_t round = 0; round < cols; ++round)
      for (int64_t j = round % 2; j + 1 < cols; j += 2) {
        const V a = values[j], b = values[j + 1];
        const Mask<T> wrong = a < b;
        values[j] = wrong ? b : a;
        values[j + 1] = wrong ? a : b;
        const Mask<T> p = order[j], q = order[j + 1];
        order[j] = wrong ? q : p;
        order[j + 1] = wrong ? p : q;
      }
  }

  // Columns of A (count, cols), `stride` apart, in the order of the values. Uses J's diagonal room as a row.
  void reorder(N* A, int64_t count, int64_t stride) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < cols; ++j) diagonal[j] = A[j * stride + i];
      for (int64_t j = 0; j < cols; ++j)
        for (int part = 0; part < N::parts; ++part)
          for (int l = 0; l < kLanes<T>; ++l) lane(A[j * stride + i], part, l) = lane(diagonal[order[j][l]], part, l);
    }
  }

  // Columns of V that σ = 0 left at zero become an orthonormal basis of what the others leave: unit vectors, those
  // nearest to it first, projected onto it twice.
  void complete_right() {
    for (int64_t j = 0; j < cols; ++j)
      for (int l = 0; l < kLanes<T>; ++l)
        if (values[j][l] == 0) complete(j, l);
  }

 private:
  static constexpr T kLevel = 16;  // columns that ascend by less are left as they are

  void complete(int64_t j, int l) {
    N* x = X + j * stride_X;
    int64_t nearest = 0;
    T least = 2;
    for (int64_t i = 0; i < cols; ++i) {
      T length2 = 0;
      for (int64_t k = 0; k < cols; ++k)
        for (int part = 0; part < N::parts; ++part) {
          const T v = lane(X[k * stride_X + i], part, l);
          length2 += v * v;
        }
      if (length2 < least) {
        least = length2;
        nearest = i;
      }
    }
    lane(x[nearest], 0, l) = 1;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t k = 0; k < cols; ++k) {
        if (k == j) continue;
        N* y = X + k * stride_X;
        T g[2] = {};
        for (int64_t i = 0; i < cols; ++i) {
          const T re = lane(y[i], 0, l), im = N::parts == 2 ? lane(y[i], 1, l) : 0;
          const T xr = lane(x[i], 0, l), xi = N::parts == 2 ? lane(x[i], 1, l) : 0;
          g[0] += re * xr + im * xi;
          g[1] += re * xi - im * xr;
        }
        for (int64_t i = 0; i < cols; ++i) {
          const T re = lane(y[i], 0, l), im = N::parts == 2 ? lane(y[i], 1, l) : 0;
          lane(x[i], 0, l) -= g[0] * re - g[1] * im;
          if (N::parts == 2) lane(x[i], 1, l) -= g[0] * im + g[1] * re;
        }
      }
      T length2 = 0;
      for (int64_t i = 0; i < cols; ++i)
        for (int part = 0; part < N::parts; ++part) length2 += lane(x[i], part, l) * lane(x[i], part, l);
      const T inverse = T(1) / static_cast<T>(__builtin_sqrt(static_cast<double>(length2)));
      for (int64_t i = 0; i < cols; ++i)
        for (int part = 0; part < N::parts; ++part) lane(x[i], part, l) *= inverse;
    }
  }

  // J = D_0⁻¹ J̃ D: its columns have unit length, which also says what rounding took from d.
  void normalise_vectors(N* x, V size, const Column<T>& column) const {
    const V inverse = size > 0 ? 1 / size : V{};
    V d = column.d / square_root<T>(column.w);
    d = d * unit_scale<T>(d);  // lengths are of no account, but a square must not leave the range
    for (int64_t i = 0; i < cols; ++i) x[i] = x[i] * inverse;
    V length2{};
    for (int64_t i = 0; i < cols; ++i) {
      const V ratio = d * columns[i].inverse_start;  // where it is out of range J̃ is 0
      x[padded + i] = x[padded + i] * (ratio > Format<T>::largest ? broadcast<T>(Format<T>::largest) : ratio);
    }
    const V near = unit_scale<T>(largest_of(x + padded, cols));
    for (int64_t i = 0; i < cols; ++i) {
      x[padded + i] = x[padded + i] * near;
      length2 += abs2(x[padded + i]);
    }
    const V unit = length2 > 0 ? 1 / square_root<T>(length2) : V{};
    for (int64_t i = 0; i < cols; ++i) x[padded + i] = x[padded + i] * unit;
  }
};

}  // namespace kd::KD_ISA
