// One-sided Jacobi of one lane group: X J = V Σ, where J is a product of plane rotations.
//
// Column j is stored as x̃ with x = d x̃/√w. A rotation by the angle with tangent t replaces (x, y) by c (x + t ē y) and
// c (y − t e x); on the stored columns that is x̃ += A ỹ, ỹ += B x̃ with the factor c² = 1/(1 + t²) left to w. With the
// norms α = |x̃|², β = |ỹ|², g = x̃ᴴỹ, q = d_y/d_x <= 1 and a = α/w_x, b = β/w_y, δ = a − q²b:
//
//   κ = t e d_x √w_y/(d_y √w_x) = (2g/w_x) / (δ ± √(δ² + 4q²|g|²/(w_x w_y)))      A = q² w_x/w_y κ*      B = −κ
//
// No quotient of norms is squared, so columns may differ by many decades. Everything a lane does depends on that
// lane alone: where it has nothing to rotate its coefficients are 0, and its columns keep their bits.
#pragma once

#include "lanes.h"

namespace kd::KD_ISA {

// The order in which pairs of columns are visited: neighbours in the list are disjoint where possible, so that one
// pair's coefficients are computed while the pair before is still being rotated; block by block where the columns
// exceed the first-level cache.
class Schedule {
 public:
  struct Pair {
    int32_t i, j;
  };
  Schedule(int64_t cols, int64_t column_bytes) : pairs_(max<int64_t>(1, cols * (cols - 1) / 2)) {
    constexpr int64_t cache = 24 * 1024;
    int64_t block = cols;
    if (cols * column_bytes > cache) block = min(cols, max<int64_t>(2, cache / (3 * column_bytes)));
    for (int64_t I = 0; I < cols; I += block) {
      const int64_t rows = min(block, cols - I);
      for (int64_t sum = 1; sum <= 2 * rows - 3; ++sum)  // like row by row, but the pairs of one sum are disjoint
        for (int64_t i = max<int64_t>(0, sum - rows + 1); 2 * i < sum; ++i) add(I + i, I + sum - i);
      for (int64_t J = I + block; J < cols; J += 2) {
        const int64_t width = min<int64_t>(2, cols - J);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < width; ++j) add(I + (i + j) % rows, J + j);
      }
    }
  }
  int64_t count() const { return count_; }
  Pair operator[](int64_t k) const { return pairs_[k]; }

 private:
  void add(int64_t i, int64_t j) { pairs_[count_++] = {static_cast<int32_t>(i), static_cast<int32_t>(j)}; }
  Buffer<Pair> pairs_;
  int64_t count_ = 0;
};

// What is known of a column beside its elements.
template <class T>
struct Column {
  Vector<T> d, inverse_d;   // its scale, and 1/d
  Vector<T> norm;           // a = |x̃|²/w
  Vector<T> w;              // product of the rotations' 1/c²
  Vector<T> inverse_start;  // 1/d as it was at first
};

template <class N>
class Jacobi {
  using T = ScalarOf<N>;
  using V = Vector<T>;

 public:
  static constexpr int kMaxSweeps = 30;
  // Rows of a column are padded with zeros to a multiple of this.
  static constexpr int kUnroll = N::parts == 2 ? 2 : 4;

  // X: columns `stride` apart of `rows` elements (padded) that are made orthogonal, then `extra` that are rotated
  // along.
  Jacobi(N* X, int64_t rows, int64_t extra, int64_t cols, int64_t stride, Column<T>* columns)
      : X_(X), rows_(rows), extra_(extra), cols_(cols), stride_(stride), columns_(columns) {}

  // Scales each column by a power of two, then sweeps until a sweep's rotations leave nothing to do.
  void run(const Schedule& schedule) {
    for (int64_t j = 0; j < cols_; ++j) prepare_column(j);
    active_ = broadcast<T>(0) == 0;
    for (sweeps = 0; sweeps < kMaxSweeps && any(active_); ++sweeps) {
      again_ = Mask<T>{};
      sweep(schedule);
      active_ = again_;
      for (int64_t j = 0; j < cols_; ++j) refresh(j, active_);
    }
  }

  V norm2(const N* x) const {
    V even{}, odd{};
    for (int64_t i = 0; i < rows_; i += 2) {
      even += abs2(x[i]);
      odd += abs2(x[i + 1]);
    }
    return even + odd;
  }

  int sweeps = 0;

 private:
  struct Rotation {
    N A, B;
    Mask<T> lost_i, lost_j;  // lanes where cancellation leaves a norm to be computed anew
    bool rotates, refreshes;
  };

  N* column(int64_t j) const { return X_ + j * stride_; }

  void prepare_column(int64_t j) {
    N* x = column(j);
    V largest{};
    for (int64_t i = 0; i < rows_; ++i) {
      const V part = largest_part(x[i]);
      largest = largest < part ? part : largest;
    }
    const V scale = unit_scale<T>(largest);
    for (int64_t i = 0; i < rows_; ++i) x[i] = x[i] * scale;
    columns_[j] = {1 / scale, scale, norm2(x), broadcast<T>(1), scale};
  }

  N dot(const N* x, const N* y) const {
    if constexpr (N::parts == 2) {
      V rr[2] = {}, ii[2] = {}, ri[2] = {}, ir[2] = {};
      for (int64_t i = 0; i < rows_; i += 2)
        for (int u = 0; u < 2; ++u) {
          rr[u] += x[i + u].re * y[i + u].re;
          ii[u] += x[i + u].im * y[i + u].im;
          ri[u] += x[i + u].re * y[i + u].im;
          ir[u] += x[i + u].im * y[i + u].re;
        }
      return {(rr[0] + rr[1]) + (ii[0] + ii[1]), (ri[0] + ri[1]) - (ir[0] + ir[1])};
    } else {
      V sum[4] = {};
      for (int64_t i = 0; i < rows_; i += 4)
        for (int u = 0; u < 4; ++u) sum[u] += x[i + u].re * y[i + u].re;
      return {(sum[0] + sum[1]) + (sum[2] + sum[3])};
    }
  }

  void rotate(N* x, N* y, const Rotation& rotation) const {
    const N A = rotation.A, B = rotation.B;
    for (int64_t i = 0; i < rows_ + extra_; i += 2)
      for (int u = 0; u < 2; ++u) {
        const N xi = x[i + u], yi = y[i + u];
        x[i + u] = add_product(xi, A, yi);
        y[i + u] = add_product(yi, B, xi);
      }
  }

  // The rotation of columns i and j; their norms and scales become those after it.
  Rotation prepare(int64_t i, int64_t j) {
    constexpr T eps = Format<T>::epsilon;
    Rotation out;
    const N g = dot(column(i), column(j));
    Column<T>&ci = columns_[i], &cj = columns_[j];
    const Mask<T> swapped = ci.d < cj.d;  // x is the column of the larger scale
    const V q = swapped ? ci.d * cj.inverse_d : cj.d * ci.inverse_d, q2 = q * q;
    const V a = swapped ? cj.norm : ci.norm, b = swapped ? ci.norm : cj.norm;
    const V wx = swapped ? cj.w : ci.w, wy = swapped ? ci.w : cj.w;
    const V inverse = 1 / (wx * wy);
    const V cosine2 = abs2(g) * inverse;  // times a b
    const Mask<T> rotated = active_ & (cosine2 > (4 * eps * eps) * (a * b));
    out.rotates = any(rotated);
    if (!out.rotates) return out;
    const V delta = a - q2 * b, root = square_root<T>(delta * delta + 4 * q2 * cosine2);
    V factor = 2 / (delta + (delta < 0 ? -root : root));
    factor = rotated ? factor : V{};
    const V h = factor * cosine2;                    // what y's squared norm loses
    const V to_y = factor * (wy * inverse);          // |κ|/γ
    const V to_x = q2 * (wx * wx * inverse) * to_y;  // q² w_x/w_y |κ|/γ
    const V kappa2 = to_y * to_y * abs2(g), tangent2 = q2 * (wx * wx * inverse) * kappa2;
    const N forth = g * to_y, back = g * to_x;
    out.A = select(swapped, -conj(forth), conj(back));  // where x is column j, its product with y is g*
    out.B = select(swapped, back, -forth);
    const V growth = 1 + tangent2, x_norm = a + q2 * h, y_norm = b - h;
    ci.norm = swapped ? y_norm : x_norm;
    cj.norm = swapped ? x_norm : y_norm;
    ci.w *= growth;
    cj.w *= growth;
    // Where every rotation changed its columns by little, the cosines left are of the order of its square.
    again_ |= rotated & (kappa2 * (a * wx) > kSettled * (b * wy));
    const Mask<T> cancelled = rotated & (y_norm < T(0.02) * b), grown = rotated & (wx * growth > kGrowth);
    out.lost_i = (swapped & cancelled) | grown;
    out.lost_j = (~swapped & cancelled) | grown;
    out.refreshes = any(cancelled | grown);
    return out;
  }

  void finish(int64_t i, int64_t j, const Rotation& rotation) {
    if (!rotation.rotates) return;
    rotate(column(i), column(j), rotation);
    if (!rotation.refreshes) return;
    refresh(i, rotation.lost_i);
    refresh(j, rotation.lost_j);
  }

  void sweep(const Schedule& schedule) {
    const int64_t count = schedule.count();
    if (count == 0 || cols_ < 2) return;
    Schedule::Pair now = schedule[0];
    Rotation rotation = prepare(now.i, now.j);
    for (int64_t k = 1; k < count; ++k) {
      const Schedule::Pair next = schedule[k];
      const bool disjoint = now.i != next.i && now.i != next.j && now.j != next.i && now.j != next.j;
      if (!disjoint) finish(now.i, now.j, rotation);
      const Rotation ahead = prepare(next.i, next.j);
      if (disjoint) finish(now.i, now.j, rotation);
      rotation = ahead;
      now = next;
    }
    finish(now.i, now.j, rotation);
  }

  // In the lanes of `mask`: |x̃|² computed anew, w moved into d, x̃ brought near 1 again. What is left of a column that
  // lost all its digits is noise, and set to zero (the rows that are rotated along keep their length).
  void refresh(int64_t j, Mask<T> mask) {
    if (!any(mask)) return;
    N* x = column(j);
    Column<T>& c = columns_[j];
    const V one = broadcast<T>(1), size = norm2(x);
    V d = c.d / square_root<T>(c.w);
    const V left = d * c.inverse_start;
    const Mask<T> noise = mask & (left * left * size <= Format<T>::epsilon * Format<T>::epsilon);
    const Mask<T> far = mask & ((size < T(0x1p-10)) | (size > T(0x1p10))) & (size > 0);
    V scale = one, along = one;
    if (any(far | noise)) {
      along = unit_scale<T>(square_root<T>(size));
      along = far & ~noise ? along : one;
      scale = noise ? V{} : along;
      for (int64_t i = 0; i < rows_; ++i) x[i] = x[i] * scale;
      for (int64_t i = rows_; i < rows_ + extra_; ++i) x[i] = x[i] * along;
    }
    d = d / along;
    c.norm = mask ? size * (scale * scale) : c.norm;
    c.inverse_d = mask ? 1 / d : c.inverse_d;
    c.d = mask ? d : c.d;
    c.w = mask ? one : c.w;
  }

  static constexpr T kSettled = Format<T>::epsilon;  // squared relative changes below it end the iteration
  static constexpr T kGrowth = sizeof(T) == 4 ? T(0x1p30) : T(0x1p200);

  N* X_;
  int64_t rows_, extra_, cols_, stride_;
  Column<T>* columns_;
  Mask<T> active_, again_;
};

}  // namespace kd::KD_ISA
