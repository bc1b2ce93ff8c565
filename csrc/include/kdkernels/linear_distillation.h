// Linear distillation on the CPU: soft targets, block by block of points, from logits that no one keeps.
//
// A head's raw product l (n, V) becomes logits y = cap·tanh(scale·(l + bias)/cap), and at temperature T, over the
// columns that are not excluded,
//   log q = log softmax(y_student/T)
//   log p = log Σ π_k softmax(y_k/T)  (arithmetic)  or  log softmax(Σ π_k y_k/T)  (geometric)
//   forward_kl  Σ p (log p − log q)
//   reverse_kl  Σ q (log q − log p)                               u = log q − log p
//   jsd         Σ β p (log p − log m) + (1 − β) q (log q − log m)   u = (1 − β) (log q − log m),  m = β p + (1 − β) q
//   tvd         ½ Σ |p − q|                                       u = ½ sign(q − p)
// with u = ∂/∂q, so that ∂/∂(y/T) = q (u − Σ q u); for forward_kl q − p. The loss of a point is
// weight·(α T² divergence + (1 − α) cross-entropy), the latter at temperature 1 over all columns.
#pragma once

#include "../../common/tensor.h"

namespace kd {

struct Bf16Tile;

enum class Divergence : int { forward_kl, reverse_kl, jsd, tvd };

// Rows of what a head's product gives, and what makes logits of them.
struct Logits {
  View rows;                      // (n, V), any strides
  View bias;                      // (V, 1), or absent
  double scale = 1, softcap = 0;  // no softcap: 0
  double share = 1;               // π, of a teacher
};

struct Integers64 {
  const int64_t* data = nullptr;
  int64_t count = 0;
};

struct LinearDistillation {
  Divergence divergence = Divergence::forward_kl;
  bool geometric = false;
  double temperature = 1, beta = 0.5, alpha = 1;
  DType accumulate = DType::float32;  // of everything below that is not a teacher's rows: float32 or float64
  View excluded;                      // (V, 1): not 0 where a column belongs to no common vocabulary; or absent
  View mixture;                       // (n, V): of the teachers before this one, or absent
  // A block of points, for `diverge` alone.
  Logits student;     // its rows are overwritten by the gradient of the raw product where `gradient`
  Integers64 labels;  // (n,), in [0, V) where the weight is not 0; or absent
  View weights;       // (n, 1), or absent
  double divisor = 1;
  View losses;  // (n, 1), or absent
  View total;   // (1, 1), float64: the block's losses are added; or absent
  bool gradient = false;
};

struct LinearDistillationKernels {
  // mixture = the first teacher's part, or mixture + another's; in the logarithm where the mixture is arithmetic.
  void (*absorb)(const LinearDistillation&, const Logits& teacher, bool first, int threads);
  // The block's losses and gradient, from the last teacher and the mixture of those before it.
  void (*diverge)(const LinearDistillation&, const Logits& teacher, int threads);
  // C (M, N) [+]= A (M, K) · B (K, N); C has adjacent columns, and is float32 or, if A or B is, float64. With a tile
  // both are rounded to bfloat16 first.
  void (*multiply)(const View& A, const View& B, const View& C, bool accumulate, const Bf16Tile*, int threads);
};

}  // namespace kd
