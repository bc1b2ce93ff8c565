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

// Two columns that meet.
struct Pair {
  int32_t i, j;
};

// The order in which pairs of columns are visited, in batches of disjoint ones; block by block where the columns exceed
// the first-level cache.
class Schedule {
 public:
  Schedule(int64_t cols, int64_t column_bytes)
      : pairs_(max<int64_t>(1, cols * (cols - 1) / 2)), sizes_(max<int64_t>(1, cols * (cols - 1) / 2)) {
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
  const Pair* pairs() const { return pairs_.get(); }
  int64_t batches() const { return batches_; }
  int batch(int64_t k) const { return sizes_[k]; }

 private:
  void add(int64_t i, int64_t j) {
    const Pair pair{static_cast<int32_t>(i), static_cast<int32_t>(j)};
    bool fits = batches_ > 0 && sizes_[batches_ - 1] < 4;
    for (int64_t k = count_ - (fits ? sizes_[batches_ - 1] : 0); k < count_; ++k) {
      const Pair other = pairs_[k];
      fits = fits && other.i != pair.i && other.i != pair.j && other.j != pair.i && other.j != pair.j;
    }
    if (!fits) sizes_[batches_++] = 0;
    ++sizes_[batches_ - 1];
    pairs_[count_++] = pair;
  }
  Buffer<Pair> pairs_;
  Buffer<int32_t> sizes_;
  int64_t count_ = 0, batches_ = 0;
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

  // `graded`: vectors of small singular values are multiplied by columns of large ones afterwards (as L_c V is), so
  // cosines are made small in proportion to √(σ_small/σ_large).
  // X: columns `stride` apart of `rows` elements (padded) that are made orthogonal, then `extra` that are rotated
  // along.
  Jacobi(N* X, int64_t rows, int64_t extra, int64_t cols, int64_t stride, Column<T>* columns, bool graded)
      : X_(X), rows_(rows), extra_(extra), cols_(cols), stride_(stride), columns_(columns), graded_(graded) {}

  // Scales each column by a power of two, then sweeps until a sweep's rotations leave nothing to do.
  void run(const Schedule& schedule) {
    for (int64_t j = 0; j < cols_; ++j) prepare_column(j);
    active_ = broadcast<T>(0) == 0;
    for (int sweeps = 0; sweeps < kMaxSweeps && any(active_); ++sweeps) {
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

 private:
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

  void rotate(N* x, N* y, N A, N B) const {
    for (int64_t i = 0; i < rows_ + extra_; i += 2)
      for (int u = 0; u < 2; ++u) {
        const N xi = x[i + u], yi = y[i + u];
        x[i + u] = add_product(xi, A, yi);
        y[i + u] = add_product(yi, B, xi);
      }
  }

  // Rotates K disjoint pairs, step by step for all of them: a quotient waits for a root, and that for an inner product.
  template <int K>
  void rotate_pairs(const Pair* pairs) {
    constexpr T eps = Format<T>::epsilon;
    N g[K];
    V a[K], b[K], wx[K], wy[K], q2[K], inverse[K], small[K], cosine2[K], delta[K], factor[K];
    Mask<T> swapped[K], rotated[K];
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) g[u] = dot(column(pairs[u].i), column(pairs[u].j));
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) {
      const Column<T>&ci = columns_[pairs[u].i], &cj = columns_[pairs[u].j];
      inverse[u] = 1 / (ci.w * cj.w);
      swapped[u] = ci.d < cj.d;  // x is the column of the larger scale
      const V q = swapped[u] ? ci.d * cj.inverse_d : cj.d * ci.inverse_d;
      q2[u] = q * q;
      small[u] = graded_ ? q : broadcast<T>(1);
      a[u] = swapped[u] ? cj.norm : ci.norm;
      b[u] = swapped[u] ? ci.norm : cj.norm;
      wx[u] = swapped[u] ? cj.w : ci.w;
      wy[u] = swapped[u] ? ci.w : cj.w;
      cosine2[u] = abs2(g[u]) * inverse[u];  // times a b
      rotated[u] = active_ & (cosine2[u] > (4 * eps * eps) * (a[u] * b[u]) * small[u]);
      delta[u] = a[u] - q2[u] * b[u];
    }
    V root[K];
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) root[u] = square_root<T>(delta[u] * delta[u] + 4 * q2[u] * cosine2[u]);
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) {
      factor[u] = 2 / (delta[u] + (delta[u] < 0 ? -root[u] : root[u]));
      factor[u] = rotated[u] ? factor[u] : V{};
    }
    N A[K], B[K];
    Mask<T> cancelled[K], grown[K];
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) {
      Column<T>&ci = columns_[pairs[u].i], &cj = columns_[pairs[u].j];
      const V h = factor[u] * cosine2[u];                    // what y's squared norm loses
      const V to_y = factor[u] * (wy[u] * inverse[u]);       // |κ|/γ
      const V ratio = q2[u] * (wx[u] * wx[u] * inverse[u]);  // q² w_x/w_y
      const V kappa2 = to_y * to_y * abs2(g[u]), growth = 1 + ratio * kappa2;
      const N forth = g[u] * to_y, back = forth * ratio;
      A[u] = select(swapped[u], -conj(forth), conj(back));  // where x is column j, its product with y is g*
      B[u] = select(swapped[u], back, -forth);
      const V x_norm = a[u] + q2[u] * h, y_norm = b[u] - h;
      ci.norm = swapped[u] ? y_norm : x_norm;
      cj.norm = swapped[u] ? x_norm : y_norm;
      ci.w *= growth;
      cj.w *= growth;
      // Where every rotation changed its columns by little, the cosines left are of the order of its square.
      again_ |= rotated[u] & (kappa2 * (a[u] * wx[u]) > kSettled * (b[u] * wy[u]) * small[u]);
      cancelled[u] = rotated[u] & (y_norm < T(0.02) * b[u]);
      grown[u] = rotated[u] & (wx[u] * growth > kGrowth);
    }
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u)
      if (any(rotated[u])) rotate(column(pairs[u].i), column(pairs[u].j), A[u], B[u]);
    Mask<T> lost{};
    for (int u = 0; u < K; ++u) lost |= cancelled[u] | grown[u];
    if (!any(lost)) return;
    for (int u = 0; u < K; ++u) {  // norms that cancellation leaves to be computed anew
      refresh(pairs[u].i, (swapped[u] & cancelled[u]) | grown[u]);
      refresh(pairs[u].j, (~swapped[u] & cancelled[u]) | grown[u]);
    }
  }

  void sweep(const Schedule& schedule) {
    const Pair* pairs = schedule.pairs();
    for (int64_t k = 0; k < schedule.batches(); ++k) {
      int count = schedule.batch(k);
      for (; count >= kTogether; count -= kTogether, pairs += kTogether) rotate_pairs<kTogether>(pairs);
      for (; count >= 2; count -= 2, pairs += 2) rotate_pairs<2>(pairs);
      if (count) rotate_pairs<1>(pairs++);
    }
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
    d = d > 0 ? d : broadcast<T>(Format<T>::smallest);
    const Mask<T> far = mask & ((size < T(0x1p-10)) | (size > T(0x1p10))) & (size > 0);
    V scale = one, along = one;
    const Mask<T> low = mask & (d < Format<T>::smallest);  // its inverse must be finite
    if (any(far | noise | low)) {
      along = unit_scale<T>(square_root<T>(size));
      along = far & ~noise ? along : one;
      const V room = d / Format<T>::smallest;
      along = (far | low) & ~noise & (room < along) ? room : along;
      scale = noise ? V{} : along;
      for (int64_t i = 0; i < rows_; ++i) x[i] = x[i] * scale;
      for (int64_t i = rows_; i < rows_ + extra_; ++i) x[i] = x[i] * along;
    }
    d = d / along;
    d = d < Format<T>::smallest ? broadcast<T>(Format<T>::smallest) : d;
    c.norm = mask ? size * (scale * scale) : c.norm;
    c.inverse_d = mask ? 1 / d : c.inverse_d;
    c.d = mask ? d : c.d;
    c.w = mask ? one : c.w;
  }

  static constexpr int kTogether = 4 / N::parts;     // pairs at a time
  static constexpr T kSettled = Format<T>::epsilon;  // squared relative changes below it end the iteration
  static constexpr T kGrowth = sizeof(T) == 4 ? T(0x1p30) : T(0x1p200);

  N* X_;
  int64_t rows_, extra_, cols_, stride_;
  Column<T>* columns_;
  bool graded_;
  Mask<T> active_, again_;
};

}  // namespace kd::KD_ISA
