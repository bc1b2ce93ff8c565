// The diagonal linear recurrence of many sequences, and its derivative:
//
//   h_t = λ ⊙ h_{t−1} + u_t           g_t = ∂h_t + λ* ⊙ g_{t+1}
//   ∂u = g      ∂λ = Σ_t g_t ⊙ h*_{t−1}      ∂h_0 = λ* ⊙ g_1
//
// States do not meet, so they lie across the lanes of the vectors and the steps follow each other; a complex number is
// two neighbours in memory and in a vector alike. With `reverse` time runs from the last step to the first.
#pragma once

#include "tensor.h"

namespace kd {

// Every view has one sequence a row, its numbers adjacent.
struct LinearRecurrence {
  View Lambda;   // (1 or N, n)
  View initial;  // (N, n), or absent
  View states;   // (N, T·n)
  int64_t steps = 0, order = 0;
  bool is_complex = false, reverse = false;
};

struct LinearRecurrenceGradients {
  View input;    // (N, T·n): ∂u
  View Lambda;   // (1 or N, n), or absent
  View initial;  // (N, n), or absent
};

struct LinearRecurrenceKernels {
  // `input` is (N, T·n), and may be the states' own memory; ∂u may be that of `grad`.
  void (*forward)(const LinearRecurrence&, const View& input, int threads);
  void (*backward)(const LinearRecurrence&, const View& grad, const LinearRecurrenceGradients&, int threads);
};

}  // namespace kd
