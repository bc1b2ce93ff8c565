// What surrounds the recurrence in a residual block whose rows are few numbers, and its derivatives:
//
//   norm   u = (x − mean) / √(variance + ε) ⊙ w + b, of each row
//          ĝ = w ⊙ ∂u     ∂x = (ĝ − mean(ĝ) − x̂ mean(ĝ ⊙ x̂)) / √(variance + ε)     ∂w = Σ ∂u ⊙ x̂     ∂b = Σ ∂u
//
//   mix    s = y + D ⊙ u     z = m₁ ⊙ s Φ(s)     a = V z + v     b = G z + g     out = x + m₂ ⊙ a ⊙ σ(b)
//          ∂a = m₂ ⊙ ∂out ⊙ σ(b)     ∂b = m₂ ⊙ ∂out ⊙ a ⊙ σ(b) (1 − σ(b))     ∂s = m₁ ⊙ (Vᵀ ∂a + Gᵀ ∂b) (Φ(s) + s φ(s))
//          ∂x = ∂out     ∂y = ∂s     ∂u = D ⊙ ∂s     ∂D = Σ ∂s ⊙ u     ∂V = Σ ∂a zᵀ     ∂v = Σ ∂a     likewise G and g
//
// Rows do not meet, so they lie across the lanes of the vectors: a row by itself would not fill one.
#pragma once

#include "tensor.h"

namespace kd {

// Every view is contiguous. Vectors of H numbers have them as columns of one row.
struct NarrowNorm {
  View input;         // (rows, H)
  View weight, bias;  // (1, H); backward does without the bias
  double eps = 0;
};

struct NarrowNormGradients {
  View input;         // (rows, H), or absent
  View weight, bias;  // (1, H), or absent
};

struct GatedMix {
  View y, u;               // (rows, H)
  View D;                  // (1, H)
  View value, value_bias;  // V (H, H), v (1, H)
  View gate, gate_bias;    // G (H, H), g (1, H)
  View inner, outer;       // m₁ and m₂ (sequences, H), or absent
  int64_t steps = 1;       // rows of a sequence
};

struct GatedMixGradients {
  View y, u;  // (rows, H), or absent; so are all of these
  View D;
  View value, value_bias;
  View gate, gate_bias;
};

struct LruBlockKernels {
  void (*norm)(const NarrowNorm&, const View& out, int threads);
  void (*norm_backward)(const NarrowNorm&, const View& grad, const NarrowNormGradients&, int threads);
  void (*mix)(const GatedMix&, const View& x, const View& out, int threads);
  void (*mix_backward)(const GatedMix&, const View& grad, const GatedMixGradients&, int threads);
};

}  // namespace kd
