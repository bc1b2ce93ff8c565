// Singular value decompositions A = U Σ Vᴴ of many small matrices (rows >= cols), Σ descending.
//
//   A = Q R (Householder)      X = Rᴴ      X J = V Σ (one-sided Jacobi: J a product of plane rotations)      U = Q J
//
// A rotation makes two columns of X orthogonal whatever their lengths are, so a singular value far below the largest
// is as accurate as X determines it (Demmel and Veselić 1992); the factor R leaves little to rotate (Drmač and Veselić
// 2008). The matrices of a batch lie side by side in the lanes of the vectors.
#pragma once

#include "tensor.h"

namespace kd {

// Every view has one matrix a row, its columns adjacent; a complex number is two adjacent reals.
struct Svd {
  View matrices;     // (batch, rows·cols) row-major
  View values;       // (batch, cols), real
  View left, right;  // (batch, rows·cols) U and (batch, cols·cols) V or Vᴴ, row-major; or both absent
  int64_t rows = 0, cols = 0;
  bool is_complex = false, right_adjoint = false;
};

struct SvdKernels {
  // A matrix that holds NaN or Inf gets NaN; the others are what they would be without it.
  void (*svd)(const Svd&, int threads);
};

}  // namespace kd
