// Projection alignment on the CPU.
//
// Points s (N, d_s) and t (N, d_t) become z_s = s W_sᵀ + b_s and z_t = t W_tᵀ + b_t in D dimensions. With
//   a = ⟨z_s,z_s⟩, b = ⟨z_s,z_t⟩, c = ⟨z_t,z_t⟩, cos = b/√(ac)   (norms clamped at 1e-8)
// the loss of a point is
//   mse      (a − 2b + c)/D                     ∂a, ∂b, ∂c = 1/D, −2/D, 1/D
//   cosine   1 − cos                            ∂a, ∂b, ∂c = cos/(2a), −1/√(ac), cos/(2c)
//   angular  acos(clamp(cos, ±(1 − 1e-7)))      cosine's row times 1/√(1 − cos²); 0 where the clamp is active
// and ∂L/∂z_s = 2∂a·z_s + ∂b·z_t, ∂L/∂z_t = ∂b·z_s + 2∂c·z_t. The total is L = Σ weight_i · loss_i.
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

struct Alignment {
  AlignmentSide sides[2];  // student, teacher
  View weights;            // (N, 1) in the accumulation dtype, or absent; weight 0 means "no such point"
  Metric metric = Metric::cosine;
  int64_t N = 0, D = 0;
  DType accumulate = DType::float32;  // float32 or float64
  View losses;                        // (N, 1), or absent
  View total;                         // (1, 1), or absent
};

// G = [W_s W_t]ᵀ[W_s W_t] over the sides that have a projection, K columns in all; in the accumulation dtype,
// contiguous. Student first: G_ss, G_st, G_tt are its blocks.
struct Grams {
  View matrix;         // (K, K): G, or after factor() the upper triangular R with RᵀR = G
  View teacher_norms;  // (N, 1) float64: ⟨z_t, z_t⟩ of a teacher that does not change, or absent
  bool norms_known = false;
};

struct ProjectionAlignmentKernels {
  // Block by block: project, reduce, overwrite with the gradient. Workspace O(block·D).
  void (*direct)(const Alignment&, int threads);
  void (*gram_matrix)(const Alignment&, const Grams&, int threads);
  // Overwrite G by its Cholesky factor. Returns the smallest squared pivot relative to G's diagonal, an estimate of
  // 1/condition; 0 when G is not positive definite (R is then incomplete).
  double (*factor)(const Grams&, int threads);
  // Cosine and angular from inner products in d_s and d_t dimensions: the cost per point does not depend on D.
  void (*gram)(const Alignment&, const Grams&, int threads);
  // The same for mse: differences are formed in the isometric coordinates R[s; −t]. Both sides have a projection.
  void (*isometric)(const Alignment&, const Grams&, int threads);
};

}  // namespace kd
