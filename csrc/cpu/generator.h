// Pivoted Cholesky of a Gramian from its generators, for one lane group (formulas in kdkernels/hankel.h).
#pragma once

#include "lanes.h"

namespace kd::KD_ISA {

// The unitary G (m, m) with f G = (‖f‖, 0, …, 0): a phase of the first coordinate, then a plane rotation of it with
// each of the others. Coordinates of very different sizes, as clustered poles leave them, stay accurate each for
// itself; b − (b u) uᴴ would leave all of them with the error of the largest.
template <class N>
struct Alignment {
  using T = ScalarOf<N>;
  N phase;
  Vector<T>* cosine;
  N* sine;  // of the rotation with coordinate c at [c]; f before prepare()

  void prepare(int64_t m) {
    N* f = sine;
    const Vector<T> scale = unit_scale<T>(largest_of(f, m)), one = broadcast<T>(1);
    Vector<T> length;
    phase = conj(direction(f[0] * scale, length));
    for (int64_t c = 1; c < m; ++c) {
      const N g = f[c] * scale;
      const Vector<T> longer = square_root<T>(length * length + abs2(g)), inverse = 1 / longer;
      cosine[c] = longer > 0 ? length * inverse : one;
      sine[c] = select(longer > 0, g * inverse, N{});
      length = longer;
    }
  }

  // b ← b G
  void apply(int64_t m, N* b) const {
    N first = b[0] * phase;
    for (int64_t c = 1; c < m; ++c) {
      const N other = b[c];
      b[c] = add_product(other * cosine[c], -first, sine[c]);
      first = add_product(first * cosine[c], other, conj(sine[c]));
    }
    b[0] = first;
  }
};

// Factor of the Gramian P_ij = b_i b_jᴴ / (1 − λ_i λ_j*), destroying the generators b (n rows of m). `den` is 1 − |λ|².
// Column k of L is at L + k·stride. `residual`, unless null, gets n + 1 traces of what the columns so far leave.
// Workspace: inverse_den (n), cosine and sine (m).
template <class N>
void factor_gramian(int64_t n, int64_t m, const N* lambda, const Vector<ScalarOf<N>>* den,
                    Vector<ScalarOf<N>>* inverse_den, N* b, Vector<ScalarOf<N>>* cosine, N* sine, N* L, int64_t stride,
                    Vector<ScalarOf<N>>* residual) {
  using T = ScalarOf<N>;
  using V = Vector<T>;
  Alignment<N> alignment{N{}, cosine, sine};
  for (int64_t i = 0; i < n; ++i) inverse_den[i] = 1 / den[i];
  for (int64_t k = 0; k < n; ++k) {
    V best = broadcast<T>(-1), trace{};
    Mask<T> row{};
    for (int64_t i = 0; i < n; ++i) {
      V norm2{};
      for (int64_t c = 0; c < m; ++c) norm2 += abs2(b[i * m + c]);
      const V d = norm2 * inverse_den[i];
      const Mask<T> better = d > best;
      best = better ? d : best;
      row = better ? whole<T>(i) : row;
      trace += d;
    }
    if (residual) residual[k] = trace;

    N pivot;
    V den_q;
    for (int l = 0; l < kLanes<T>; ++l) {
      const int64_t q = row[l];
      den_q[l] = den[q][l];
      for (int part = 0; part < N::parts; ++part) {
        lane(pivot, part, l) = lane(lambda[q], part, l);
        for (int64_t c = 0; c < m; ++c) lane(sine[c], part, l) = lane(b[q * m + c], part, l);
      }
    }
    const V root = best > 0 ? square_root<T>(den_q) : V{};
    if (m > 0) alignment.prepare(m);

    N* column = L + k * stride;
    for (int64_t i = 0; i < n; ++i) {
      N* row_i = b + i * m;
      N along{};  // b_i u
      if (m > 0) {
        alignment.apply(m, row_i);
        along = row_i[0];
      }
      // 1 − λ_i λ_q* = 1 − |λ_q|² − (λ_i − λ_q) λ_q*, where neither term is larger than twice the whole
      const N apart = lambda[i] - pivot;
      const N share = along * reciprocal(add_product(from_real<N>(den_q), -apart, conj(pivot)));
      column[i] = share * root;
      if (m > 0) row_i[0] = share * apart;
    }
    for (int l = 0; l < kLanes<T>; ++l)
      for (int64_t c = 0; c < m; ++c)
        for (int part = 0; part < N::parts; ++part) lane(b[row[l] * m + c], part, l) = 0;
  }
  if (residual) residual[n] = V{};
}

}  // namespace kd::KD_ISA
