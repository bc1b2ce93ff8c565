// Projection alignment, point by point: the metrics and their derivatives, row reductions, and rows in and out of
// tensors. Sums run in double: they are few beside the products, and 1 − cos keeps its digits where cos is near 1.
#pragma once

#include "kdkernels/projection_alignment.h"
#include "rows.h"

namespace kd::KD_ISA {

constexpr double kEps = 1e-8, kAngularEps = 1e-7;

// The loss of one point and the factors of its gradient: ∂z_s = own_s·z_s + mixed·z_t, ∂z_t = mixed·z_s + own_t·z_t.
struct PointGradient {
  double loss, own_s, mixed, own_t;
};

inline PointGradient cosine_point(double a, double b, double c, bool angular) {
  constexpr double eps2 = kEps * kEps;
  const double a1 = a < eps2 ? eps2 : a, c1 = c < eps2 ? eps2 : c;
  const double inverse = 1 / __builtin_sqrt(a1 * c1), cos = b * inverse;
  PointGradient g{1 - cos, a < eps2 ? 0 : cos / a1, -inverse, c < eps2 ? 0 : cos / c1};
  if (angular) {
    constexpr double limit = 1 - kAngularEps;
    const bool clamped = cos > limit || cos < -limit;
    g.loss = __builtin_acos(cos > limit ? limit : cos < -limit ? -limit : cos);
    const double slope = clamped ? 0 : 1 / __builtin_sqrt((1 - cos) * (1 + cos));
    g.own_s *= slope;
    g.mixed *= slope;
    g.own_t *= slope;
  }
  return g;
}

// Σ term(i) over i < n, in a fixed order.
template <class F>
inline double sum(int64_t n, F&& term) {
  constexpr int lanes = 16;
  double partial[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int l = 0; l < lanes; ++l) partial[l] += term(i + l);
  double total = 0;
  for (int l = 0; l < lanes; ++l) total += partial[l];
  for (; i < n; ++i) total += term(i);
  return total;
}

template <class T>
inline double dot(const T* x, const T* y, int64_t n) {
  return sum(n, [=](int64_t i) { return static_cast<double>(x[i]) * static_cast<double>(y[i]); });
}

template <class T>
inline double squared_distance(const T* x, const T* y, int64_t n) {
  return sum(n, [=](int64_t i) {
    const double difference = static_cast<double>(x[i]) - static_cast<double>(y[i]);
    return difference * difference;
  });
}

// The points that count: all of them, or those whose weight is not 0.
template <class T>
class Points {
 public:
  Points(const View& weights, double divisor, int64_t N)
      : count(N), weights_(static_cast<const T*>(weights.data)), scale_(1 / divisor) {
    if (!weights_) return;
    stride_ = weights.row_stride;
    index_ = Buffer<int64_t>(N);
    count = 0;
    for (int64_t i = 0; i < N; ++i)
      if (weights_[i * stride_] != 0) index_[count++] = i;
  }
  int64_t row(int64_t i) const { return weights_ ? index_[i] : i; }
  double weight(int64_t i) const { return weights_ ? scale_ * weights_[index_[i] * stride_] : scale_; }
  bool all(int64_t N) const { return count == N; }

  int64_t count;

 private:
  const T* weights_;
  double scale_;
  int64_t stride_ = 0;
  Buffer<int64_t> index_;
};

// Rows of a tensor as contiguous elements of T: where they lie if they are that already, else copied to a buffer.
template <class T>
class RowReader {
 public:
  RowReader(const View& view, const Points<T>& points, int64_t block)
      : view_(view),
        points_(points),
        in_place_(view.dtype == kDType<T> && view.col_stride == 1 && points.all(view.rows)) {
    if (!in_place_) buffer_ = Buffer<T>(block * view.cols);
  }
  // Make rows [begin, begin + count) of the points available at data(), stride() apart.
  void read(int threads, int64_t begin, int64_t count) {
    if (in_place_) {
      data_ = static_cast<const T*>(view_.data) + begin * view_.row_stride;
      return;
    }
    parallel_chunks(threads, count, kRowGrain, [&](int64_t i0, int64_t i1) {
      with_type(view_.dtype, [&]<class S>(S*) {
        for (int64_t i = i0; i < i1; ++i) {
          const S* from = static_cast<const S*>(view_.data) + points_.row(begin + i) * view_.row_stride;
          T* to = buffer_.get() + i * view_.cols;
          if (view_.col_stride == 1)
            for (int64_t j = 0; j < view_.cols; ++j) to[j] = load<T>(from + j);
          else
            for (int64_t j = 0; j < view_.cols; ++j) to[j] = load<T>(from + j * view_.col_stride);
        }
      });
    });
    data_ = buffer_.get();
  }
  const T* data() const { return data_; }
  int64_t stride() const { return in_place_ ? view_.row_stride : view_.cols; }

 private:
  View view_;
  const Points<T>& points_;
  bool in_place_;
  Buffer<T> buffer_;
  const T* data_ = nullptr;
};

// Points that do not count have a loss and a gradient of zero.
template <class T>
inline void zero_skipped(int threads, const Points<T>& points, const View& weights, const View& out) {
  if (!out || points.all(out.rows)) return;
  const T* w = static_cast<const T*>(weights.data);
  parallel_chunks(threads, out.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (w[i * weights.row_stride] == 0) write_row<T>(out, i, nullptr);
  });
}

}  // namespace kd::KD_ISA
