// CUDA kernels: raw pointers on the current device, sizes, a stream. Arrays are contiguous and row-major, complex
// numbers two adjacent reals. A system that holds NaN or Inf (or |λ| ≥ 1) gives NaN, and the others are unaffected.
#pragma once

#include "tensor.h"

namespace kd {

// A = U Σ Vᴴ of small matrices with rows ≥ cols: values descending; vectors both or neither.
struct CudaSvd {
  DType dtype = DType::float32;
  bool is_complex = false;
  int64_t batch = 0, rows = 0, cols = 0;
  const void* matrices = nullptr;  // (batch, rows, cols)
  void* values = nullptr;          // (batch, cols), real
  void* left = nullptr;            // U (batch, rows, cols), or null
  void* right = nullptr;           // V (batch, cols, cols), or null
};

// P = L_c L_cᴴ and Q = L_o L_oᴴ of h⁺ = Λh + Bu, y = Ch; the singular values of L_oᴴ L_c = U Σ Vᴴ; and
// T = L_c V Σ^-½, W = L_o U Σ^-½. What is null is not computed.
struct CudaHankel {
  DType dtype = DType::float32;
  bool is_complex = false;
  int64_t batch = 0, n = 0, m = 0, p = 0;
  const void *Lambda = nullptr, *B = nullptr, *C = nullptr;  // (batch, n), (batch, n, m), (batch, p, n)
  void *factor_c = nullptr, *factor_o = nullptr;             // (batch, n, n)
  void *residual_c = nullptr, *residual_o = nullptr;         // (batch, n + 1), real
  void* values = nullptr;                                    // (batch, n), real
  void *T = nullptr, *W = nullptr;                           // (batch, n, n), both or neither
};

// Bytes of scratch memory, aligned to 16, that the call wants on the current device. Its contents do not matter.
int64_t cuda_svd_workspace(const CudaSvd& call);
int64_t cuda_hankel_workspace(const CudaHankel& call);

// Enqueue on the stream. Throw std::runtime_error where CUDA refuses, with its reason.
void cuda_svd(const CudaSvd& call, void* workspace, void* stream);
void cuda_hankel(const CudaHankel& call, void* workspace, void* stream);

}  // namespace kd
