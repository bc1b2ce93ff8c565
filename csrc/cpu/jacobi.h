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
//
// Where only values are wanted, the last rotations are not carried out. One that changes its columns by a share s moves
// their squared norms by s², and three columns have at most s³ to do with each other: below s³ = ε the changes of all
// pairs add up.
#pragma once

#include "lanes.h"

namespace kd::KD_ISA {

// Two columns that meet.
struct Pair {
  int32_t i, j;
};

// Meetings in an order, in batches of up to four disjoint ones.
class Meetings {
 public:
  explicit Meetings(int64_t most) : pairs_(max<int64_t>(1, most)), sizes_(max<int64_t>(1, most)) {}
  const Pair* pairs() const { return pairs_.get(); }
  int64_t batches() const { return batches_; }
  int batch(int64_t k) const { return sizes_[k]; }

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

  // All of `items` with all, numbered `step` apart; block by block where they exceed the first-level cache.
  void add_all(int64_t items, int64_t bytes, int64_t step) {
    constexpr int64_t cache = 24 * 1024;
    int64_t block = items;
    if (items * bytes > cache) block = min(items, max<int64_t>(2, cache / (3 * bytes)));
    for (int64_t I = 0; I < items; I += block) {
      const int64_t rows = min(block, items - I);
      for (int64_t sum = 1; sum <= 2 * rows - 3; ++sum)  // like row by row, but the pairs of one sum are disjoint
        for (int64_t i = max<int64_t>(0, sum - rows + 1); 2 * i < sum; ++i) add(step * (I + i), step * (I + sum - i));
      for (int64_t J = I + block; J < items; J += 2) {
        const int64_t width = min<int64_t>(2, items - J);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < width; ++j) add(step * (I + (i + j) % rows), step * (J + j));
      }
    }
  }

 private:
  Buffer<Pair> pairs_;
  Buffer<int32_t> sizes_;
  int64_t count_ = 0, batches_ = 0;
};

// A sweep: all pairs of columns; or twos of neighbours with twos of neighbours, all four pairs in one pass over memory,
// beside the pairs that are left.
struct Schedule {
  Meetings pairs, twos;

  Schedule(int64_t cols, int64_t column_bytes, bool in_twos)
      : pairs(in_twos ? 2 * cols : cols * (cols - 1) / 2), twos(in_twos ? cols * cols / 8 : 0) {
    if (!in_twos) {
      pairs.add_all(cols, column_bytes, 1);
      return;
    }
    for (int64_t i = 0; i + 1 < cols; i += 2) pairs.add(i, i + 1);
    for (int64_t i = 0; cols % 2 && i + 1 < cols; ++i) pairs.add(i, cols - 1);
    twos.add_all(cols / 2, 2 * column_bytes, 2);
  }
};

// What is known of a column beside its elements.
template <class T>
struct Column {
  Vector<T> d, inverse_d;   // its scale, and 1/d
  Vector<T> norm;           // a = |x̃|²/w
  Vector<T> w;              // product of the rotations' 1/c²
  Vector<T> correction;     // of a, by rotations that were not carried out
  Vector<T> inverse_start;  // 1/d as it was at first
};

template <class N>
class Jacobi {
  using T = ScalarOf<N>;
  using V = Vector<T>;

 public:
  static constexpr int kMaxSweeps = 30;
  // Whether columns meet in twos: rotations of real numbers wait for memory, those of complex ones do not.
  static constexpr bool kTwos = N::parts == 1;
  // Rows of a column are padded with zeros to a multiple of this.
  static constexpr int kUnroll = N::parts == 2 ? 2 : 4;

  // `values_only`: the columns end up nearly orthogonal, with corrections of their norms.
  // `graded`: vectors of small singular values are multiplied by columns of large ones afterwards (as L_c V is), so
  // cosines are made small in proportion to √(σ_small/σ_large).
  // X: columns `stride` apart of `rows` elements (padded) that are made orthogonal, then `extra` that are rotated
  // along.
  Jacobi(N* X, int64_t rows, int64_t extra, int64_t cols, int64_t stride, Column<T>* columns, bool values_only,
         bool graded)
      : X_(X),
        rows_(rows),
        extra_(extra),
        cols_(cols),
        stride_(stride),
        columns_(columns),
        settled_(values_only ? kNear : kSettled),
        values_only_(values_only),
        graded_(graded) {}

  // Scales each column by a power of two, then sweeps until a sweep's rotations leave nothing to do.
  void run(const Schedule& schedule) {
    for (int64_t j = 0; j < cols_; ++j) prepare_column(j);
    active_ = broadcast<T>(0) == 0;
    for (int sweeps = 0; sweeps < kMaxSweeps && any(active_); ++sweeps) {
      again_ = Mask<T>{};
      visit<4>(schedule.pairs, [this]<int K>(const Pair* pairs) { rotate_pairs<K>(pairs); });
      if constexpr (kTwos) visit<2>(schedule.twos, [this]<int K>(const Pair* twos) { rotate_twos<K>(twos); });
      for (int64_t j = 0; j < cols_; ++j) refresh(j, active_);
      active_ = again_;
      if (!values_only_ || any(again_)) continue;
      add_corrections(schedule);
      active_ = again_;  // where it is not enough
    }
    if (values_only_ && any(active_)) add_corrections(schedule);  // a neighbour did not settle
  }

  // Of what is left of column j: its length.
  V value(int64_t j) const {
    const V size = columns_[j].norm + columns_[j].correction;
    return size > 0 ? columns_[j].d * square_root<T>(size) : V{};
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

  void add_corrections(const Schedule& schedule) {
    active_ = broadcast<T>(0) == 0;
    again_ = Mask<T>{};
    for (int64_t j = 0; j < cols_; ++j) columns_[j].correction = V{};
    visit<4>(schedule.pairs, [this]<int K>(const Pair* pairs) { correct_pairs<K>(pairs); });
    if constexpr (kTwos) visit<2>(schedule.twos, [this]<int K>(const Pair* twos) { correct_twos<K>(twos); });
  }

  void prepare_column(int64_t j) {
    N* x = column(j);
    const V scale = unit_scale<T>(largest_of(x, rows_));
    for (int64_t i = 0; i < rows_; ++i) x[i] = x[i] * scale;
    columns_[j] = {1 / scale, scale, norm2(x), broadcast<T>(1), V{}, scale};
  }

  N dot(const N* x, const N* y) const {
    if constexpr (N::parts == 2) {
      V rr[2] = {}, ii[2] = {}, ri[2] = {}, ir[2] = {};
      for (int64_t i = 0; i < rows_; i += 2)
        for (int u = 0; u < 2; ++u) {
          const N xi = held(x[i + u]), yi = held(y[i + u]);
          rr[u] += xi.re * yi.re;
          ii[u] += xi.im * yi.im;
          ri[u] += xi.re * yi.im;
          ir[u] += xi.im * yi.re;
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

  // K disjoint pairs and their rotations, step by step for all of them: a quotient waits for a root, and that for an
  // inner product.
  template <int K>
  struct Rotations {
    Pair pairs[K];
    N g[K], A[K], B[K];
    V a[K], b[K], wx[K], wy[K], q2[K], inverse[K], small[K], cosine2[K], factor[K];
    V share2[K], other2[K];  // s² of y times b, and of x times a: norms need not fall as scales do
    Mask<T> swapped[K], rotated[K], lost_i[K], lost_j[K];
  };

  template <int K>
  void multiply(const Pair* pairs, Rotations<K>& r) const {
    for (int u = 0; u < K; ++u) r.pairs[u] = pairs[u];
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) r.g[u] = dot(column(r.pairs[u].i), column(r.pairs[u].j));
  }

  // The factor of g in κ and the share s of the columns that changes, from g and the norms.
  template <int K>
  void measure(Rotations<K>& r) const {
    constexpr T eps = Format<T>::epsilon;
    V delta[K], root[K];
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) {
      const Column<T>&ci = columns_[r.pairs[u].i], &cj = columns_[r.pairs[u].j];
      r.inverse[u] = 1 / (ci.w * cj.w);
      r.swapped[u] = ci.d < cj.d;  // x is the column of the larger scale
      const V q = r.swapped[u] ? ci.d * cj.inverse_d : cj.d * ci.inverse_d;
      r.q2[u] = q * q;
      r.small[u] = graded_ ? q : broadcast<T>(1);
      r.a[u] = r.swapped[u] ? cj.norm : ci.norm;
      r.b[u] = r.swapped[u] ? ci.norm : cj.norm;
      r.wx[u] = r.swapped[u] ? cj.w : ci.w;
      r.wy[u] = r.swapped[u] ? ci.w : cj.w;
      r.cosine2[u] = abs2(r.g[u]) * r.inverse[u];  // times a b
      r.rotated[u] = active_ & (r.cosine2[u] > (4 * eps * eps) * (r.a[u] * r.b[u]) * r.small[u]);
      delta[u] = r.a[u] - r.q2[u] * r.b[u];
    }
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) root[u] = square_root<T>(delta[u] * delta[u] + 4 * r.q2[u] * r.cosine2[u]);
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) {
      r.factor[u] = 2 / (delta[u] + (delta[u] < 0 ? -root[u] : root[u]));
      r.factor[u] = r.rotated[u] ? r.factor[u] : V{};
      const V tangent2 = r.factor[u] * r.factor[u] * r.cosine2[u];
      r.share2[u] = tangent2 * r.a[u];
      r.other2[u] = tangent2 * (r.q2[u] * r.q2[u]) * r.b[u];
    }
  }

  // A and B, and what they do to the columns' norms and w. Returns whether cancellation leaves norms to be computed
  // anew, or w has grown too far.
  template <int K>
  bool turn(Rotations<K>& r) {
    Mask<T> lost{};
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) {
      Column<T>&ci = columns_[r.pairs[u].i], &cj = columns_[r.pairs[u].j];
      const V h = r.factor[u] * r.cosine2[u];                        // what y's squared norm loses
      const V to_y = r.factor[u] * (r.wy[u] * r.inverse[u]);         // |κ|/γ
      const V ratio = r.q2[u] * (r.wx[u] * r.wx[u] * r.inverse[u]);  // q² w_x/w_y
      const V kappa2 = to_y * to_y * abs2(r.g[u]), growth = 1 + ratio * kappa2;
      const N forth = r.g[u] * to_y, back = forth * ratio;
      r.A[u] = select(r.swapped[u], -conj(forth), conj(back));  // where x is column j, its product with y is g*
      r.B[u] = select(r.swapped[u], back, -forth);
      const V x_norm = r.a[u] + r.q2[u] * h, y_norm = r.b[u] - h;
      ci.norm = r.swapped[u] ? y_norm : x_norm;
      cj.norm = r.swapped[u] ? x_norm : y_norm;
      ci.w *= growth;
      cj.w *= growth;
      // Where every rotation changed its columns by little, the cosines left are of the order of its square.
      again_ |= (r.share2[u] > settled_ * r.b[u] * r.small[u]) | (r.other2[u] > settled_ * r.a[u]);
      const Mask<T> x_lost = r.rotated[u] & (x_norm < T(0.02) * r.a[u]),
                    y_lost = r.rotated[u] & (y_norm < T(0.02) * r.b[u]);
      const Mask<T> grown = r.rotated[u] & (r.wx[u] * growth > kGrowth);
      r.lost_i[u] = (r.swapped[u] ? y_lost : x_lost) | grown;
      r.lost_j[u] = (r.swapped[u] ? x_lost : y_lost) | grown;
      lost |= x_lost | y_lost | grown;
    }
    return any(lost);
  }

  template <int K>
  void carry_out(const Rotations<K>& r) const {
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u)
      if (any(r.rotated[u])) rotate(column(r.pairs[u].i), column(r.pairs[u].j), r.A[u], r.B[u]);
  }

  template <int K>
  void mend(const Rotations<K>& r) {
    for (int u = 0; u < K; ++u) {
      refresh(r.pairs[u].i, r.lost_i[u]);
      refresh(r.pairs[u].j, r.lost_j[u]);
    }
  }

  template <int K>
  void rotate_pairs(const Pair* pairs) {
    Rotations<K> r;
    multiply(pairs, r);
    measure(r);
    const bool lost = turn(r);
    carry_out(r);
    if (lost) mend(r);
  }

  // Inner products of the columns x, x + 1 and y, y + 1.
  struct Gram {
    N xx, yy, straight[2], across[2];  // x_k y_k, x_k y_1−k
  };
  Gram gram(Pair twos) const {
    const N *x = column(twos.i), *y = column(twos.j), *x1 = x + stride_, *y1 = y + stride_;
    N sum[2][6] = {};
    for (int64_t i = 0; i < rows_; i += 2)
      for (int u = 0; u < 2; ++u) {
        const N a = held(x[i + u]), b = held(x1[i + u]), c = held(y[i + u]), d = held(y1[i + u]);
        sum[u][0] = add_conj_product(sum[u][0], a, b);
        sum[u][1] = add_conj_product(sum[u][1], c, d);
        sum[u][2] = add_conj_product(sum[u][2], a, c);
        sum[u][3] = add_conj_product(sum[u][3], b, d);
        sum[u][4] = add_conj_product(sum[u][4], a, d);
        sum[u][5] = add_conj_product(sum[u][5], b, c);
      }
    return {sum[0][0] + sum[1][0],
            sum[0][1] + sum[1][1],
            {sum[0][2] + sum[1][2], sum[0][3] + sum[1][3]},
            {sum[0][4] + sum[1][4], sum[0][5] + sum[1][5]}};
  }

  // Each column of K twos with both of another, in one pass: x_k with y_k, then x_k with y_1−k, whose inner products
  // follow from those of before.
  template <int K>
  void rotate_twos(const Pair* twos) {
    Gram grams[K];
    Rotations<2 * K> straight, across;
    for (int k = 0; k < K; ++k) {
      grams[k] = gram(twos[k]);
      for (int u = 0; u < 2; ++u) {
        straight.pairs[2 * k + u] = {twos[k].i + u, twos[k].j + u};
        across.pairs[2 * k + u] = {twos[k].i + u, twos[k].j + 1 - u};
        straight.g[2 * k + u] = grams[k].straight[u];
      }
    }
    measure(straight);
    const bool lost = turn(straight);
    for (int k = 0; k < K; ++k)
      for (int u = 0; u < 2; ++u) {
        const int e = 2 * k + u, f = 2 * k + 1 - u;  // x_u turned with y_u, and y_1−u with x_1−u
        const N xx = u ? conj(grams[k].xx) : grams[k].xx, yy = u ? conj(grams[k].yy) : grams[k].yy;
        const N x_y = add_product(grams[k].across[u], straight.B[f], xx);
        const N y_y = add_product(yy, straight.B[f], conj(grams[k].across[1 - u]));
        across.g[e] = add_conj_product(x_y, straight.A[e], y_y);
      }
    if (lost) {
      carry_out(straight);
      mend(straight);
      for (int e = 0; e < 2 * K; ++e) {
        const auto [i, j] = across.pairs[e];
        const int f = e ^ 1;
        const Mask<T> stale = straight.lost_i[e] | straight.lost_j[e] | straight.lost_i[f] | straight.lost_j[f];
        if (any(stale)) across.g[e] = select(stale, dot(column(i), column(j)), across.g[e]);
      }
    }
    measure(across);
    const bool lost_too = turn(across);
    if (lost)
      carry_out(across);
    else
      for (int k = 0; k < K; ++k) carry_out_twos(twos[k], straight, across, 2 * k);
    if (lost_too) mend(across);
  }

  template <int K>
  void carry_out_twos(Pair twos, const Rotations<K>& straight, const Rotations<K>& across, int e) const {
    if (!any(straight.rotated[e] | straight.rotated[e + 1] | across.rotated[e] | across.rotated[e + 1])) return;
    N *x0 = column(twos.i), *x1 = x0 + stride_, *y0 = column(twos.j), *y1 = y0 + stride_;
    const N A0 = straight.A[e], B0 = straight.B[e], A1 = straight.A[e + 1], B1 = straight.B[e + 1];
    const N C0 = across.A[e], D0 = across.B[e], C1 = across.A[e + 1], D1 = across.B[e + 1];
    for (int64_t i = 0; i < rows_ + extra_; ++i) {
      const N a = x0[i], b = x1[i], c = y0[i], d = y1[i];
      const N x = add_product(a, A0, c), y = add_product(c, B0, a), xx = add_product(b, A1, d),
              yy = add_product(d, B1, b);
      x0[i] = add_product(x, C0, yy);
      y1[i] = add_product(yy, D0, x);
      x1[i] = add_product(xx, C1, y);
      y0[i] = add_product(y, D1, xx);
    }
  }

  // Adds what rotations would do to their columns' norms; `again_` gets the lanes where that is too much to add up.
  template <int K>
  void correct(Rotations<K>& r) {
    measure(r);
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) {
      const V h = r.factor[u] * r.cosine2[u], grown = r.q2[u] * h;
      columns_[r.pairs[u].i].correction += r.swapped[u] ? -h : grown;
      columns_[r.pairs[u].j].correction += r.swapped[u] ? grown : -h;
      again_ |= (r.share2[u] > kAddsUp * r.b[u]) | (r.other2[u] > kAddsUp * r.a[u]);
    }
  }
  template <int K>
  void correct_pairs(const Pair* pairs) {
    Rotations<K> r;
    multiply(pairs, r);
    correct(r);
  }
  template <int K>
  void correct_twos(const Pair* twos) {
    Rotations<4 * K> r;
    for (int k = 0; k < K; ++k) {
      const Gram found = gram(twos[k]);
      for (int u = 0; u < 2; ++u) {
        r.pairs[4 * k + u] = {twos[k].i + u, twos[k].j + u};
        r.pairs[4 * k + 2 + u] = {twos[k].i + u, twos[k].j + 1 - u};
        r.g[4 * k + u] = found.straight[u];
        r.g[4 * k + 2 + u] = found.across[u];
      }
    }
    correct(r);
  }

  // f<K>(meetings) for all of them, K <= Most disjoint ones at a time.
  template <int Most, class F>
  static void visit(const Meetings& meetings, F&& f) {
    const Pair* next = meetings.pairs();
    for (int64_t k = 0; k < meetings.batches(); ++k) {
      int count = meetings.batch(k);
      for (; count >= Most; count -= Most, next += Most) f.template operator()<Most>(next);
      if (Most > 2 && count >= 2) f.template operator()<2>(next), count -= 2, next += 2;
      if (count) f.template operator()<1>(next++);
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

  static constexpr T kSettled = Format<T>::epsilon;  // squared relative changes below it end the iteration
  static constexpr T kAddsUp = sizeof(T) == 4 ? T(1e-5) : T(4e-11);  // s² where s³ is below ε
  static constexpr T kNear = sizeof(T) == 4 ? T(4e-3) : T(8e-6);     // after it s², squared, is mostly below that
  static constexpr T kGrowth = sizeof(T) == 4 ? T(0x1p30) : T(0x1p200);

  N* X_;
  int64_t rows_, extra_, cols_, stride_;
  Column<T>* columns_;
  T settled_;
  bool values_only_, graded_;
  Mask<T> active_, again_;
};

}  // namespace kd::KD_ISA
