// What a kernel knows of a tensor: where it is, what it holds, and how far apart its elements lie.
#pragma once

#include <cstdint>
#include <cstring>

namespace kd {

enum class DType : int { float32, float64, bfloat16 };

struct bfloat16 {
  uint16_t bits;
};

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// A matrix with arbitrary strides (in elements); a vector has cols == 1. `data == nullptr` stands for "absent".
struct View {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 0;

  explicit operator bool() const { return data != nullptr; }
};

}  // namespace kd
