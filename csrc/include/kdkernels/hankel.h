// Gramian factors and Hankel singular values of many small systems h⁺ = Λh + Bu, y = Ch with |λ| < 1:
//
//   P_ij = (BBᴴ)_ij / (1 − λ_i λ_j*)  = L_c L_cᴴ      Q_ij = (CᴴC)_ij / (1 − λ_i* λ_j)  = L_o L_oᴴ
//   M = L_oᴴ L_c = U Σ Vᴴ      T = L_c V Σ^-½      W = L_o U Σ^-½
//
// P is never formed. Pivoted Cholesky of its generators b_i (the rows of B), with pivot d = max ‖b_i‖²/(1 − |λ_i|²)
// at row q, u = b_qᴴ/‖b_q‖ and φ(z) = (z − λ_q)/(1 − λ_q* z):
//
//   L_ik = b_i u √(1 − |λ_q|²) / (1 − λ_i λ_q*)      b_i ← b_i + (φ(λ_i) − 1) b_i u uᴴ      b_q ← 0
//
// where the b_i are first rotated so that u is a unit vector, and only one coordinate is multiplied by φ. Nothing is
// subtracted from a pivot, so each is as accurate as the differences 1 − λ_i λ_q*, which are 1 − |λ_q|², formed with
// compensated products, less (λ_i − λ_q) λ_q*; the sum of those that remain is the trace of what the columns leave of
// P.
#pragma once

#include "tensor.h"

namespace kd {

// Every view has one system a row, its columns adjacent; a complex number is two adjacent reals.
// Views that are absent are not computed.
struct Hankel {
  View Lambda;                  // (batch, n)
  View B, C;                    // (batch, n·m), (batch, p·n) row-major
  View factor_c, factor_o;      // (batch, n·n) row-major: L_c and L_o; column k is the k-th pivot's
  View residual_c, residual_o;  // (batch, n+1), real: what remains of the trace before column k
  View values;                  // (batch, n), real, descending
  View T, W;                    // (batch, n·n) row-major; columns of σ = 0 are zero
  int64_t n = 0, m = 0, p = 0;
  bool is_complex = false;
};

struct HankelKernels {
  // A system that holds NaN or Inf, or some |λ| >= 1, gets NaN; the others are what they would be without it.
  void (*hankel)(const Hankel&, int threads);
};

}  // namespace kd
