#include "kdkernels/hankel.h"

#include "generator.h"
#include "lane_io.h"
#include "spectrum.h"

namespace kd::KD_ISA {
namespace {

// R by C of the inner products M = XᴴY (n, n), all columns contiguous.
template <int R, int C, class N>
void inner_products_tile(int64_t n, const N* X, const N* Y, N* M) {
  N sum[R][C] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int c = 0; c < C; ++c) {
      const N y = held(Y[c * n + i]);
      for (int r = 0; r < R; ++r) sum[r][c] = add_conj_product(sum[r][c], X[r * n + i], y);
    }
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) M[c * n + r] = sum[r][c];
}

// M = L_oᴴ L_c (n, n).
template <class N>
void inner_products(int64_t n, const N* Lo, const N* Lc, N* M) {
  int64_t k = 0;
  for (; k + 1 < n; k += 2) {
    int64_t j = 0;
    for (; j + 1 < n; j += 2) inner_products_tile<2, 2>(n, Lo + j * n, Lc + k * n, M + k * n + j);
    if (j < n) inner_products_tile<1, 2>(n, Lo + j * n, Lc + k * n, M + k * n + j);
  }
  if (k < n)
    for (int64_t j = 0; j < n; ++j) inner_products_tile<1, 1>(n, Lo + j * n, Lc + k * n, M + k * n + j);
}

// out = L V diag(scale) for V (n, n) with columns `stride` apart.
template <class N>
void project(int64_t n, const N* L, const N* V, int64_t stride, const Vector<ScalarOf<N>>* scale, N* out) {
  for (int64_t j = 0; j < n; ++j) {
    N* to = out + j * n;
    for (int64_t i = 0; i < n; ++i) to[i] = N{};
    for (int64_t k = 0; k < n; ++k) {
      const N v = V[j * stride + k] * scale[j];
      for (int64_t i = 0; i < n; ++i) to[i] = add_product(to[i], v, L[k * n + i]);
    }
  }
}

// One lane group's systems and its workspace.
template <class N>
class Systems {
  using T = ScalarOf<N>;
  using V = Vector<T>;

 public:
  static bool wants_vectors(const Hankel& call) { return call.T || call.W; }
  static bool wants_spectrum(const Hankel& call) { return call.values || wants_vectors(call); }

  explicit Systems(const Hankel& call, int64_t index = 0, V* memory = nullptr)
      : call_(call), index_(index), n_(call.n), room_(memory), svd_(n_, n_, wants_vectors(call), room_) {
    const int64_t io = max(call.m, call.p);
    lambda_ = room_.template take<N>(n_);
    generators_ = room_.template take<N>(n_ * io);
    sine_ = room_.template take<N>(io);
    Lc_ = room_.template take<N>(n_ * n_);
    Lo_ = room_.template take<N>(n_ * n_);
    if (wants_vectors(call)) {
      left_ = room_.template take<N>(n_ * n_);
      projected_ = room_.template take<N>(n_ * n_);
    }
    cosine_ = room_.template take<V>(io);
    den_ = room_.template take<V>(n_);
    inverse_den_ = room_.template take<V>(n_);
    unit_ = room_.template take<V>(n_);
    residual_ = room_.template take<V>(n_ + 1);
  }
  int64_t vectors() const { return room_.vectors(); }

  void run(const Schedule& schedule) {
    read_poles();
    const bool both = wants_spectrum(call_);
    // Both sides are read before either is factored: what is bad in one of them spoils the system.
    read_outputs();
    for (int64_t i = 0; i < n_; ++i) unit_[i] = largest_of(generators_ + i * call_.p, call_.p);
    const Mask<T> bad_outputs = not_finite(generators_, n_ * call_.p);
    read_inputs();
    bad_ |= bad_outputs | not_finite(generators_, n_ * call_.m);
    choose_units();
    for (int64_t i = 0; i < n_; ++i) {
      lambda_[i] = select(bad_, N{}, lambda_[i]);
      den_[i] = bad_ ? broadcast<T>(1) : den_[i];
    }
    V scale_c = broadcast<T>(1), scale_o = broadcast<T>(1);
    if (both || call_.factor_c || call_.residual_c) {
      for (int64_t k = 0; k < n_ * call_.m; ++k) generators_[k] = generators_[k] * unit_[k / call_.m];
      scale_c = factor(call_.m, Lc_, call_.factor_c, call_.residual_c);
    }
    if (both || call_.factor_o || call_.residual_o) {
      read_outputs();
      for (int64_t k = 0; k < n_ * call_.p; ++k) generators_[k] = generators_[k] * (1 / unit_[k / call_.p]);
      for (int64_t i = 0; i < n_; ++i) lambda_[i] = conj(lambda_[i]);
      scale_o = factor(call_.p, Lo_, call_.factor_o, call_.residual_o);
    }
    if (both) decompose(schedule, scale_c, scale_o);
  }

 private:
  // Units of the states, powers of two, in which a state's row of B and column of C are of one size: σ does not depend
  // on units, but squares of rows that are far apart would leave the range. unit_ holds the columns' largest parts.
  // Factors and residuals are asked for in the units given.
  void choose_units() {
    const bool free = !call_.factor_c && !call_.factor_o && !call_.residual_c && !call_.residual_o;
    for (int64_t i = 0; i < n_; ++i) {
      const V in = largest_of(generators_ + i * call_.m, call_.m), out = unit_[i], one = broadcast<T>(1);
      const V ratio = square_root<T>(unit_scale<T>(in)) / square_root<T>(unit_scale<T>(out));
      const V unit = 1 / unit_scale<T>(ratio);
      unit_[i] = free & ~bad_ & (in > 0) & (out > 0) ? unit : one;
    }
  }

  void read_poles() {
    read_numbers(Group<T>(call_.Lambda, index_), n_, lambda_);
    bad_ = not_finite(lambda_, n_);
    for (int64_t i = 0; i < n_; ++i) {
      den_[i] = one_minus_abs2(lambda_[i]);
      bad_ |= ~(den_[i] > 0);
    }
  }
  void read_inputs() { read_numbers(Group<T>(call_.B, index_), n_ * call_.m, generators_); }
  void read_outputs() {  // rows of Cᴴ
    const int64_t p = call_.p;
    read_columns(Group<T>(call_.C, index_), p, n_, generators_, p);
    for (int64_t k = 0; k < n_ * p; ++k) generators_[k] = conj(generators_[k]);
  }

  // L of the generators that were read times the power of two that is returned.
  V factor(int64_t m, N* L, const View& factor_view, const View& residual_view) {
    const V scale = normalise(generators_, n_ * m, bad_), inverse = 1 / scale;
    factor_gramian(n_, m, lambda_, den_, inverse_den_, generators_, cosine_, sine_, L, n_,
                   residual_view ? residual_ : nullptr);
    if (residual_view)
      Group<T>(residual_view, index_).write(0, n_ + 1, [&](int64_t k) {
        return bad_ ? nan() : residual_[k] * inverse * inverse;
      });
    if (factor_view)
      Group<T>(factor_view, index_).write(0, n_ * n_ * N::parts, [&](int64_t k) {
        const int64_t e = k / N::parts;
        return bad_ ? nan() : real_part(L + e % n_ * n_ + e / n_, k % N::parts) * inverse + 0;
      });
    return scale;
  }

  void decompose(const Schedule& schedule, V scale_c, V scale_o) {
    const bool with_vectors = wants_vectors(call_);
    inner_products(n_, Lo_, Lc_, svd_.M);
    svd_.decompose(schedule, with_vectors, with_vectors);
    if (with_vectors) svd_.left_vectors(left_, n_);
    svd_.sort();
    if (call_.values) {
      const V scale = (1 / scale_c) * (1 / scale_o);
      Group<T>(call_.values, index_).write(0, n_, [&](int64_t k) { return bad_ ? nan() : svd_.values[k] * scale; });
    }
    if (!with_vectors) return;
    for (int64_t j = 0; j < n_; ++j) svd_.values[j] = svd_.values[j] > 0 ? 1 / square_root<T>(svd_.values[j]) : V{};
    const V balance = square_root<T>(scale_o) / square_root<T>(scale_c);
    if (call_.T) {
      svd_.reorder(svd_.X, n_, svd_.stride_X);
      project_and_write(Lc_, svd_.X, svd_.stride_X, svd_.values, balance, call_.T);
    }
    if (call_.W) {
      svd_.reorder(left_, n_, n_);
      project_and_write(Lo_, left_, n_, svd_.values, 1 / balance, call_.W);
    }
  }

  void project_and_write(const N* L, const N* vectors, int64_t stride, const V* scale, V balance, const View& view) {
    project(n_, L, vectors, stride, scale, projected_);
    const bool inputs = L == Lc_;
    for (int64_t k = 0; k < n_ * n_; ++k) {
      const V unit = unit_[k % n_];
      projected_[k] = projected_[k] * (balance * (inputs ? 1 / unit : unit));
    }
    write_columns(Group<T>(view, index_), n_, n_, projected_, n_, bad_);
  }

  static V nan() { return broadcast<T>(static_cast<T>(__builtin_nan(""))); }

  const Hankel& call_;
  int64_t index_, n_;
  Workspace<T> room_;
  Decomposition<N> svd_;
  Mask<T> bad_;
  N *lambda_, *generators_, *sine_, *Lc_, *Lo_, *left_ = nullptr, *projected_ = nullptr;
  V *cosine_, *den_, *inverse_den_, *unit_, *residual_;
};

template <class N>
void hankel_all(const Hankel& call, int threads) {
  using T = ScalarOf<N>;
  const int64_t n = call.n, batch = call.Lambda.rows;
  if (batch == 0 || n == 0) return;
  threads = useful_threads(threads, batch * n * n * 10 * (n + call.m + call.p));
  const int64_t room = round_up(Systems<N>(call).vectors(), 64);
  const Schedule schedule = Decomposition<N>::schedule(n, Systems<N>::wants_vectors(call));
  const Buffer<Vector<T>> rooms(threads * room);
  parallel_for(threads, ceil_div(batch, kLanes<T>),
               [&](int64_t index, int worker) { Systems<N>(call, index, rooms.get() + worker * room).run(schedule); });
}

}  // namespace

extern const HankelKernels hankel;
const HankelKernels hankel = {
    [](const Hankel& call, int threads) {
      const bool wide = call.Lambda.dtype == DType::float64;
      if (call.is_complex)
        wide ? hankel_all<Complex<double>>(call, threads) : hankel_all<Complex<float>>(call, threads);
      else
        wide ? hankel_all<Real<double>>(call, threads) : hankel_all<Real<float>>(call, threads);
    },
};

}  // namespace kd::KD_ISA
