// Rows of tensors: written in whatever dtype they store, and gradients accumulated in another than that.
#pragma once

#include "simd.h"

namespace kd::KD_ISA {

constexpr int64_t kRowGrain = 16;  // rows a task of a row-wise pass

// out[row] = from, converted to what the tensor stores; zero if there is nothing to write.
template <class T>
inline void write_row(const View& out, int64_t row, const T* from) {
  with_type(out.dtype, [&]<class S>(S*) {
    S* to = static_cast<S*>(out.data) + row * out.row_stride;
    for (int64_t j = 0; j < out.cols; ++j) store(to + j, from ? from[j] : T{});
  });
}

// A gradient accumulated in T: in the output itself where it stores T, else in a buffer that finish() converts.
template <class T>
class Accumulator {
 public:
  explicit Accumulator(const View& out) : out_(out) {
    if (out.dtype != kDType<T>) buffer_ = Buffer<T>(out.rows * out.cols);
    data_ = buffer_.get() ? buffer_.get() : static_cast<T*>(out.data);
  }
  T* data() const { return data_; }
  // Whether there is something to add to; from now on there is.
  bool started() {
    const bool before = started_;
    started_ = true;
    return before;
  }
  void finish(int threads) const {
    parallel_chunks(threads, out_.rows, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (!started_)
          write_row<T>(out_, i, nullptr);
        else if (buffer_.get())
          write_row(out_, i, data_ + i * out_.cols);
      }
    });
  }

 private:
  View out_;
  Buffer<T> buffer_;
  T* data_ = nullptr;
  bool started_ = false;
};

}  // namespace kd::KD_ISA
