// Projection alignment on the CPU.
//
// Points s (N, d_s) and t (N, d_t) become z_s = s W_sᵀ + b_s and z_t = t W_tᵀ + b_t in D dimensions. With
//   a = ⟨z_s,z_s⟩, b = ⟨z_s,z_t⟩, c = ⟨z_t,z_t⟩, cos = b/√(ac)   (norms clamped at 1e-8)
// the loss of a point is
//   mse      (a − 2b + c)/D                     ∂a, ∂b, ∂c = 1/D, −2/D, 1/D
//   cosine   1 − cos                            ∂a, ∂b, ∂c = cos/(2a), −1/√(ac), cos/(2c)
//   angular  acos(clamp(cos, ±(1 − 1e-7)))      cosine's row times 1/√(1 − cos²); 0 where the clamp is active
// and ∂L/∂z_s = 2∂a·z_s + ∂b·z_t, ∂L/∂z_t = ∂b·z_s + 2∂c·z_t. The total is L = Σ weight_i · loss_i / divisor.
#pragma once

#include "../../common/tensor.h"

namespace kd {

enum class Metric : int { cosine, mse, angular };

// One side of the comparison. Absent views are inputs that were not given or outputs that were not asked for.
// Gradients are written in their own dtype; their rows are contiguous.
struct AlignmentSide {
  View points;  // (N, d)
  View proj;    // (D, d)
  View bias;    // (D, 1)
  View grad_points, grad_proj, grad_bias;
};

struct Bf16Tile;

struct Alignment {
  AlignmentSide sides[2];  // student, teacher
  View weights;            // (N, 1) in the accumulation dtype, or absent; weight 0 means "no such point"
  double divisor = 1;      // of every weight
  Metric metric = Metric::cosine;
  int64_t N = 0, D = 0;
  DType accumulate = DType::float32;  // float32 or float64
  View losses;                        // (N, 1), or absent
  View total;                         // (1, 1), or absent
  const Bf16Tile* bf16 = nullptr;     // how bfloat16 numbers are multiplied, if there are instructions for it
};

// With K = d_s + d_t and the Cholesky factorisation [W_s W_t]ᵀ[W_s W_t] = RᵀR, the points y_s = R[:, :d_s] s and
// y_t = R[:, d_s:] t have the inner products of z_s and z_t, and the same cancellations: none that D would not have.
struct Grams {
  View factor;  // (K, K): R, upper triangular; in the accumulation dtype and contiguous
  // Of a teacher that does not change; read where they are known, else written. Absent, or
  View teacher_tails;  // (N, 1) float64: ‖y_t[d_s:]‖²
  View teacher_heads;  // (N, d_s): y_t[:d_s], in the accumulation dtype; only beside known tails
  bool tails_known = false, heads_known = false;
};

struct ProjectionAlignmentKernels {
  // Block by block: project, reduce, overwrite with the gradient. Workspace O(block·D).
  void (*direct)(const Alignment&, int threads);
  // Fill `factor`. Returns the smallest squared pivot relative to G's diagonal, an estimate of 1/condition; 0 when G
  // is not positive definite (the factor is then incomplete).
  double (*factor)(const Alignment&, const Grams&, int threads);
  // Of a matrix's bytes: rows of `row_bytes`, `stride_bytes` apart. Tells whether frozen projections still are.
  uint64_t (*fingerprint)(const void* data, int64_t rows, int64_t row_bytes, int64_t stride_bytes, int threads);
  // The same numbers as direct from K dimensions in place of D. Both sides have a projection and no bias.
  void (*gram)(const Alignment&, const Grams&, int threads);
};

}  // namespace kd
