#include "kdkernels/projection_alignment.h"

#include "alignment_rows.h"
#include "cholesky.h"
#include "fingerprint.h"
#include "gemm_bf16.h"

namespace kd::KD_ISA {
namespace {

struct Wants {
  bool points, proj, bias;
  explicit Wants(const AlignmentSide& side) : points(side.grad_points), proj(side.grad_proj), bias(side.grad_bias) {}
  bool any() const { return points || proj || bias; }
};

// What every method keeps while it walks over blocks of points.
template <class T>
struct Walk {
  Walk(const Alignment& alignment, int64_t rows, int thread_count)
      : p(alignment),
        threads(useful_threads(thread_count, p.N * p.D * (p.sides[0].points.cols + p.sides[1].points.cols))),
        points(p.weights, p.divisor, p.N),
        block(min(rows, max<int64_t>(points.count, 1))),
        x{{p.sides[0].points, points, block}, {p.sides[1].points, points, block}},
        wants{Wants(p.sides[0]), Wants(p.sides[1])},
        gradients(block) {}

  // f(begin, count) for each block, with the block's points at hand.
  template <class F>
  void each(F&& f) {
    for (int64_t begin = 0; begin < points.count; begin += block) {
      const int64_t count = min(block, points.count - begin);
      for (auto& reader : x) reader.read(threads, begin, count);
      f(begin, count);
    }
    if (p.total) store(p);
    for (const AlignmentSide& side : p.sides) zero_skipped(threads, points, p.weights, side.grad_points);
    zero_skipped(threads, points, p.weights, p.losses);
  }

  // Keep a point's loss and its gradient's factors, both weighted.
  void keep(int64_t begin, int64_t i, PointGradient g) {
    const double w = points.weight(begin + i);
    gradients[i] = {w * g.loss, w * g.own_s, w * g.mixed, w * g.own_t};
    if (p.losses) {
      const T loss = static_cast<T>(w * g.loss);
      write_row(p.losses, points.row(begin + i), &loss);
    }
  }
  void add_losses(int64_t count) {
    for (int64_t i = 0; i < count; ++i) total += gradients[i].loss;
  }
  const T* row(int side, int64_t i) const { return x[side].data() + i * x[side].stride(); }
  Operand<T> block_of(int side) const { return operand(x[side].data(), x[side].stride()); }

  const Alignment& p;
  int threads;
  Points<T> points;
  int64_t block;
  RowReader<T> x[2];
  Wants wants[2];
  Buffer<PointGradient> gradients;
  double total = 0;

 private:
  void store(const Alignment& alignment) { write_row(alignment.total, 0, &total); }
};

// Write rows of T (block rows, contiguous) into the rows of a gradient that belong to the block's points.
template <class T>
void write_block(const Walk<T>& walk, const View& out, int64_t begin, int64_t count, const T* rows) {
  parallel_chunks(walk.threads, count, kRowGrain, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) write_row(out, walk.points.row(begin + i), rows + i * out.cols);
  });
}

// grad_points rows = multiply(to, how far apart they are), straight into the gradient where its layout allows.
template <class T, class F>
void multiply_into_rows(const Walk<T>& walk, const View& out, int64_t begin, int64_t count, T* scratch, F&& multiply) {
  const bool direct = out.dtype == kDType<T> && walk.points.all(walk.p.N);
  T* to = direct ? static_cast<T*>(out.data) + begin * out.row_stride : scratch;
  multiply(to, direct ? out.row_stride : out.cols);
  if (!direct) write_block(walk, out, begin, count, scratch);
}

// ---- direct -------------------------------------------------------------------------------------------------------

// One projected point: where its z lies, and where its gradient goes (in place, or scratch for an unprojected side).
template <class T>
void point_gradient(int64_t D, const PointGradient& g, Metric metric, const T* z_s, const T* z_t, T* dz_s, T* dz_t) {
  if (metric == Metric::mse) {  // own_s = −mixed = own_t: the difference is formed first, so nothing cancels later
    for (int64_t j = 0; j < D; ++j) {
      const double d = g.own_s * (static_cast<double>(z_s[j]) - static_cast<double>(z_t[j]));
      if (dz_s) dz_s[j] = static_cast<T>(d);
      if (dz_t) dz_t[j] = static_cast<T>(-d);
    }
    return;
  }
  for (int64_t j = 0; j < D; ++j) {
    const double s = z_s[j], t = z_t[j];
    if (dz_s) dz_s[j] = static_cast<T>(g.own_s * s + g.mixed * t);
    if (dz_t) dz_t[j] = static_cast<T>(g.mixed * s + g.own_t * t);
  }
}

// The loss of a point from its first `n` coordinates and ‖z_t‖² in the others, where z_s is 0.
template <class T>
PointGradient compare(Metric metric, int64_t D, int64_t n, const T* z_s, const T* z_t, double tail) {
  if (metric == Metric::mse) return {(squared_distance(z_s, z_t, n) + tail) / D, 2.0 / D, -2.0 / D, 2.0 / D};
  return cosine_point(dot(z_s, z_s, n), dot(z_s, z_t, n), dot(z_t, z_t, n) + tail, metric == Metric::angular);
}

// A projection's products. Where points and projection are bfloat16 and the processor multiplies that, their own are
// exact and what is differentiated is rounded to bfloat16 before it meets them, as autograd would; sums are float32.
template <class T>
class Multiplier {
 public:
  Multiplier(const Alignment& p, const AlignmentSide& side)
      : tile_(sizeof(T) == sizeof(float) && kVectorBytes == 64 && side.points.dtype == DType::bfloat16 &&
                      side.proj.dtype == DType::bfloat16
                  ? p.bf16
                  : nullptr) {}
  void operator()(int threads, int64_t M, int64_t N, int64_t K, Operand<T> A, Operand<T> B, T* C, int64_t ldc,
                  bool accumulate = false) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == sizeof(float))
      if (tile_) return gemm_bf16(*tile_, threads, M, N, K, A, 1, B, C, ldc, accumulate);
#endif
    gemm(threads, M, N, K, A, B, C, ldc, accumulate);
  }

 private:
  const Bf16Tile* tile_;
};

template <class T>
void direct(const Alignment& p, int available_threads) {
  const int64_t D = p.D;
  // Blocks of about 16 MB a side: large enough that packing the weights again for each is cheap.
  Walk<T> walk(p, round_up(min<int64_t>(max<int64_t>((int64_t{4} << 20) / max<int64_t>(D, 1), 128), 2048), 64),
               available_threads);
  const int threads = walk.threads;
  struct Side {
    Buffer<T> z, dx;
    Buffer<double> bias_sum;
  } sides[2];
  for (int x = 0; x < 2; ++x) {
    const AlignmentSide& side = p.sides[x];
    if (side.proj) sides[x].z = Buffer<T>(walk.block * D);
    if (side.proj && side.grad_points) sides[x].dx = Buffer<T>(walk.block * side.points.cols);
    if (side.grad_bias) sides[x].bias_sum = Buffer<double>(D);
    for (int64_t j = 0; side.grad_bias && j < D; ++j) sides[x].bias_sum[j] = 0;
  }
  const Multiplier<T> multiply[2] = {{p, p.sides[0]}, {p, p.sides[1]}};
  Accumulator<T> dw[2] = {Accumulator<T>(p.sides[0].grad_proj), Accumulator<T>(p.sides[1].grad_proj)};
  Buffer<T> scratch(threads * 2 * D);

  walk.each([&](int64_t begin, int64_t count) {
    for (int x = 0; x < 2; ++x)
      if (const View& W = p.sides[x].proj)
        multiply[x](threads, count, D, W.cols, walk.block_of(x), operand<T>(W).transposed(), sides[x].z.get(), D);

    parallel_for(threads, ceil_div(count, kRowGrain), [&](int64_t chunk, int worker) {
      for (int64_t i = chunk * kRowGrain; i < min(count, (chunk + 1) * kRowGrain); ++i) {
        const T* z[2];
        T* dz[2];
        for (int x = 0; x < 2; ++x) {
          T* own = sides[x].z.get() ? sides[x].z.get() + i * D : nullptr;
          if (const View& bias = p.sides[x].bias)
            with_type(bias.dtype, [&]<class S>(S*) {
              for (int64_t j = 0; j < D; ++j) own[j] += load<T>(static_cast<const S*>(bias.data) + j * bias.row_stride);
            });
          z[x] = own ? own : walk.row(x, i);
          dz[x] = !walk.wants[x].any() ? nullptr : own ? own : scratch.get() + (2 * worker + x) * D;
        }
        walk.keep(begin, i, compare(p.metric, D, D, z[0], z[1], 0));
        if (!dz[0] && !dz[1]) continue;
        point_gradient(D, walk.gradients[i], p.metric, z[0], z[1], dz[0], dz[1]);
        for (int x = 0; x < 2; ++x)
          if (dz[x] && !p.sides[x].proj) write_row(p.sides[x].grad_points, walk.points.row(begin + i), dz[x]);
      }
    });
    walk.add_losses(count);

    for (int x = 0; x < 2; ++x) {
      const AlignmentSide& side = p.sides[x];
      if (!side.proj) continue;
      const Operand<T> dz = operand(sides[x].z.get(), D);
      if (side.grad_proj)
        multiply[x](threads, D, side.proj.cols, count, dz.transposed(), walk.block_of(x), dw[x].data(), side.proj.cols,
                    dw[x].started());
      if (side.grad_points)
        multiply_into_rows(walk, side.grad_points, begin, count, sides[x].dx.get(), [&](T* to, int64_t stride) {
          multiply[x](threads, count, side.proj.cols, D, dz, operand<T>(side.proj), to, stride);
        });
      if (side.grad_bias)
        parallel_chunks(threads, D, 256, [&](int64_t j0, int64_t j1) {
          for (int64_t i = 0; i < count; ++i)
            for (int64_t j = j0; j < j1; ++j) sides[x].bias_sum[j] += sides[x].z[i * D + j];
        });
    }
  });

  for (int x = 0; x < 2; ++x) {
    if (p.sides[x].grad_proj) dw[x].finish(threads);
    if (p.sides[x].grad_bias)
      for (int64_t j = 0; j < D; ++j) write_row(p.sides[x].grad_bias, j, &sides[x].bias_sum[j]);
  }
}

// ---- gram ---------------------------------------------------------------------------------------------------------

// G = [W_s W_t]ᵀ[W_s W_t]: the student's columns come first.
struct Blocks {
  explicit Blocks(const Alignment& p) : width{p.sides[0].proj.cols, p.sides[1].proj.cols}, K(width[0] + width[1]) {}
  int64_t width[2], K;
};

template <class T>
double factor(const Alignment& p, const Grams& grams, int threads) {
  const Blocks b(p);
  const int64_t d_s = b.width[0], d_t = b.width[1], K = b.K;
  const Operand<T> W_s = operand<T>(p.sides[0].proj), W_t = operand<T>(p.sides[1].proj);
  T* G = static_cast<T*>(grams.factor.data);
  gemm(threads, d_s, d_s, p.D, W_s.transposed(), W_s, G, K, false, {Band::symmetric});
  gemm(threads, d_s, d_t, p.D, W_s.transposed(), W_t, G + d_s, K);
  gemm(threads, d_t, d_t, p.D, W_t.transposed(), W_t, G + d_s * (K + 1), K, false, {Band::symmetric});
  return cholesky(threads, K, G);
}

// Moments of the points, M_ss = Σ own_s s sᵀ, M_tt = Σ own_t t tᵀ and M_st = Σ mixed s tᵀ, and the weight gradients
// they give: ∂W_s = W_s M_ss + W_t M_stᵀ, ∂W_t = W_s M_st + W_t M_tt.
template <class T>
class Moments {
 public:
  Moments(Walk<T>& walk, const Blocks& blocks) : walk_(walk), b_(blocks), p_(walk.p) {
    for (auto& scale : scale_) scale = Buffer<T>(walk.block);
    for (int x = 0; x < 2; ++x)
      if (p_.sides[x].grad_proj) own_[x] = Buffer<T>(b_.width[x] * b_.width[x]);
    if (any()) mixed_ = Buffer<T>(b_.width[0] * b_.width[1]);
  }

  void add(int64_t count) {
    if (!any()) return;
    for (int64_t i = 0; i < count; ++i) {
      const PointGradient& g = walk_.gradients[i];
      scale_[0][i] = static_cast<T>(g.own_s);
      scale_[1][i] = static_cast<T>(g.own_t);
      scale_[2][i] = static_cast<T>(g.mixed);
    }
    for (int x = 0; x < 2; ++x)
      if (own_[x].get())
        gemm(walk_.threads, b_.width[x], b_.width[x], count, scaled(x, scale_[x]), walk_.block_of(x), own_[x].get(),
             b_.width[x], started_, {Band::symmetric});
    gemm(walk_.threads, b_.width[0], b_.width[1], count, scaled(0, scale_[2]), walk_.block_of(1), mixed_.get(),
         b_.width[1], started_);
    started_ = true;
  }

  void finish() {
    const Operand<T> M_st = operand(mixed_.get(), b_.width[1]);
    for (int x = 0; x < 2; ++x) {
      const int64_t d = b_.width[x], other = b_.width[1 - x];
      if (!own_[x].get()) continue;
      Accumulator<T> dw(p_.sides[x].grad_proj);
      if (started_) {
        mirror(walk_.threads, d, own_[x].get());
        gemm(walk_.threads, p_.D, d, d, operand<T>(p_.sides[x].proj), operand(own_[x].get(), d), dw.data(), d,
             dw.started());
        gemm(walk_.threads, p_.D, d, other, operand<T>(p_.sides[1 - x].proj), x == 1 ? M_st : M_st.transposed(),
             dw.data(), d, dw.started());
      }
      dw.finish(walk_.threads);
    }
  }

 private:
  bool any() const { return p_.sides[0].grad_proj || p_.sides[1].grad_proj; }
  Operand<T> scaled(int side, const Buffer<T>& scale) const {  // xᵀ with each point scaled
    Operand<T> x = walk_.block_of(side).transposed();
    x.scale = scale.get();
    return x;
  }

  Walk<T>& walk_;
  const Blocks& b_;
  const Alignment& p_;
  Buffer<T> own_[2], mixed_, scale_[3];
  bool started_ = false;
};

// y_s = R_ss s has d_s coordinates, y_t = (R_st t, R_tt t) has K: the head, which y_s meets, and a tail.
template <class T>
void gram(const Alignment& p, const Grams& grams, int available_threads) {
  const Blocks b(p);
  const int64_t d_s = b.width[0], d_t = b.width[1], K = b.K;
  Walk<T> walk(p, 1024, available_threads);
  const int threads = walk.threads;
  Moments<T> moments(walk, b);
  const Operand<T> R_s = operand(static_cast<const T*>(grams.factor.data), K);
  const Operand<T> R_t = operand(static_cast<const T*>(grams.factor.data) + d_s, K);
  double* tails = static_cast<double*>(grams.teacher_tails.data);
  T* heads = static_cast<T*>(grams.teacher_heads.data);
  const int64_t width_t = grams.tails_known ? d_s : K;  // a known tail needs no coordinates
  Buffer<T> y_s(walk.block * d_s), y_t(heads ? 0 : walk.block * width_t), dx(walk.block * max(d_s, d_t));

  walk.each([&](int64_t begin, int64_t count) {
    T* block_t = heads ? heads + begin * d_s : y_t.get();
    gemm(threads, count, d_s, d_s, walk.block_of(0), R_s.transposed(), y_s.get(), d_s, false, {Band::lower});
    if (!grams.heads_known)
      gemm(threads, count, width_t, d_t, walk.block_of(1), R_t.transposed(), block_t, width_t, false,
           {Band::lower, d_s});
    parallel_chunks(threads, count, kRowGrain, [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) {
        T *s = y_s.get() + i * d_s, *t = block_t + i * width_t;
        const double tail = grams.tails_known ? tails[begin + i] : dot(t + d_s, t + d_s, d_t);
        if (tails && !grams.tails_known) tails[begin + i] = tail;
        walk.keep(begin, i, compare(p.metric, p.D, d_s, s, t, tail));
        const PointGradient& g = walk.gradients[i];
        point_gradient(d_s, g, p.metric, s, t, walk.wants[0].points ? s : nullptr, walk.wants[1].points ? t : nullptr);
        for (int64_t j = d_s; walk.wants[1].points && j < K; ++j) t[j] = static_cast<T>(g.own_t * t[j]);
      }
    });
    walk.add_losses(count);
    if (p.sides[0].grad_points)
      multiply_into_rows(walk, p.sides[0].grad_points, begin, count, dx.get(), [&](T* to, int64_t stride) {
        gemm(threads, count, d_s, d_s, operand(y_s.get(), d_s), R_s, to, stride, false, {Band::upper});
      });
    if (p.sides[1].grad_points)
      multiply_into_rows(walk, p.sides[1].grad_points, begin, count, dx.get(), [&](T* to, int64_t stride) {
        gemm(threads, count, d_t, K, operand(y_t.get(), K), R_t, to, stride, false, {Band::upper, d_s});
      });
    moments.add(count);
  });
  moments.finish();
}

template <class F, class... Args>
auto in_type(DType dtype, F&& f, Args&&... args) {
  return dtype == DType::float64 ? f(double{}, args...) : f(float{}, args...);
}

}  // namespace

extern const ProjectionAlignmentKernels projection_alignment;
const ProjectionAlignmentKernels projection_alignment = {
    [](const Alignment& p, int threads) { in_type(p.accumulate, [&]<class T>(T) { direct<T>(p, threads); }); },
    [](const Alignment& p, const Grams& g, int threads) {
      return in_type(p.accumulate, [&]<class T>(T) { return factor<T>(p, g, threads); });
    },
    fingerprint,
    [](const Alignment& p, const Grams& g, int threads) {
      in_type(p.accumulate, [&]<class T>(T) { gram<T>(p, g, threads); });
    },
};

}  // namespace kd::KD_ISA
