// Linear layers with low-rank adapters that share their input x (N, d_in). For layer k, with α its scaling:
//
//   Y = x Wᵀ + b + α S Bᵀ      S = x̂ Aᵀ      x̂ = mask ⊙ x / (1 − p)
//   dS = α dY B      dA = dSᵀ x̂      dB = α dYᵀ S      dW = dYᵀ x      db = Σ dY
//   dX = Σ_k dY W + mask ⊙ (dS A) / (1 − p)
//
// Arithmetic is that of the base layers; so what counts is bytes. Forward reads x once for all S, and adds α S Bᵀ
// within the base product. Backward reads dY once for dS and dB, x once for all dA, and adds dS A within the product
// for dX (before it, where there is dropout). Masks are drawn anew from Philox each time they are needed.
#pragma once

#include "tensor.h"

namespace kd {

struct LoraLayer {
  View weight;                                  // (d_out, d_in)
  View bias;                                    // (d_out, 1), or absent
  View lora_A, lora_B;                          // (r, d_in), (d_out, r)
  View projected;                               // S (N, r), contiguous, in the accumulation dtype
  View output;                                  // forward: Y (N, d_out), or absent where S alone is wanted
  View grad_output;                             // backward: dY (N, d_out)
  View grad_weight, grad_bias, grad_A, grad_B;  // backward: as their operands, or absent where not wanted
  double scaling = 1, dropout_p = 0;
  uint64_t seed = 0, offset = 0;
};

struct LoraLinear {
  View input;       // (N, d_in)
  View grad_input;  // backward: (N, d_in), or absent
  LoraLayer* layers = nullptr;
  int64_t count = 0;
  DType accumulate = DType::float32;  // float32 or float64
  bool base_done = false;             // backward: Σ dY W already lies in grad_input, and the rest is added to it
};

struct LoraLinearKernels {
  void (*forward)(const LoraLinear&, int threads);
  void (*backward)(const LoraLinear&, int threads);
};

}  // namespace kd
