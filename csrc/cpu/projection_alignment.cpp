#include "kdkernels/projection_alignment.h"

#include "alignment_rows.h"
#include "cholesky.h"
#include "gemm.h"

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
        threads(thread_count),
        points(p.weights, p.N),
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

// grad_points rows = A (count, k) · B, straight into the gradient where its layout allows.
template <class T>
void multiply_into_rows(const Walk<T>& walk, const View& out, int64_t begin, int64_t count, int64_t k, Operand<T> A,
                        Operand<T> B, T* scratch, Band band = {}) {
  const bool direct = out.dtype == kDType<T> && walk.points.all(walk.p.N);
  T* to = direct ? static_cast<T*>(out.data) + begin * out.row_stride : scratch;
  gemm(walk.threads, count, out.cols, k, A, B, to, direct ? out.row_stride : out.cols, false, band);
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

template <class T>
PointGradient direct_point(Metric metric, int64_t D, const T* z_s, const T* z_t) {
  if (metric == Metric::mse) return {squared_distance(z_s, z_t, D) / D, 2.0 / D, -2.0 / D, 2.0 / D};
  return cosine_point(dot(z_s, z_s, D), dot(z_s, z_t, D), dot(z_t, z_t, D), metric == Metric::angular);
}

template <class T>
void direct(const Alignment& p, int threads) {
  const int64_t D = p.D;
  // Blocks of about 16 MB a side: large enough that packing the weights again for each is cheap.
  Walk<T> walk(p, round_up(min<int64_t>(max<int64_t>((int64_t{4} << 20) / max<int64_t>(D, 1), 128), 2048), 64),
               threads);
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
  Accumulator<T> dw[2] = {Accumulator<T>(p.sides[0].grad_proj), Accumulator<T>(p.sides[1].grad_proj)};
  Buffer<T> scratch(threads * 2 * D);

  walk.each([&](int64_t begin, int64_t count) {
    for (int x = 0; x < 2; ++x)
      if (const View& W = p.sides[x].proj)
        gemm(threads, count, D, W.cols, walk.block_of(x), operand<T>(W).transposed(), sides[x].z.get(), D);

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
        walk.keep(begin, i, direct_point(p.metric, D, z[0], z[1]));
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
        gemm(threads, D, side.proj.cols, count, dz.transposed(), walk.block_of(x), dw[x].data(), side.proj.cols,
             dw[x].started());
      if (side.grad_points)
        multiply_into_rows(walk, side.grad_points, begin, count, D, dz, operand<T>(side.proj), sides[x].dx.get());
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

// G's blocks: side x occupies columns [offset[x], offset[x] + width[x]) of K; an unprojected side has width 0.
struct Blocks {
  explicit Blocks(const Alignment& p) {
    for (int x = 0; x < 2; ++x) width[x] = p.sides[x].proj ? p.sides[x].proj.cols : 0;
    offset[1] = width[0];
    K = width[0] + width[1];
  }
  int64_t width[2], offset[2] = {0, 0}, K;
};

template <class T>
void gram_matrix(const Alignment& p, const Grams& grams, int threads) {
  const Blocks b(p);
  T* G = static_cast<T*>(grams.matrix.data);
  for (int x = 0; x < 2; ++x) {
    if (!p.sides[x].proj) continue;
    const Operand<T> W = operand<T>(p.sides[x].proj);
    gemm(threads, b.width[x], b.width[x], p.D, W.transposed(), W, G + b.offset[x] * (b.K + 1), b.K, false,
         {Band::symmetric});
    if (x == 1 && b.width[0])
      gemm(threads, b.width[0], b.width[1], p.D, operand<T>(p.sides[0].proj).transposed(), W, G + b.width[0], b.K);
  }
  mirror(threads, b.K, G);
}

// Moments of the points, M_xx = Σ own_x x xᵀ and M_st = Σ mixed s tᵀ, and the weight gradients they give:
// ∂W_s = W_s M_ss + W_t M_stᵀ, ∂W_t = W_s M_st + W_t M_tt. An unprojected side stands for W = 1.
template <class T>
class Moments {
 public:
  Moments(Walk<T>& walk, const Blocks& blocks)
      : walk_(walk),
        b_(blocks),
        p_(walk.p),
        dw_{Accumulator<T>(p_.sides[0].grad_proj), Accumulator<T>(p_.sides[1].grad_proj)} {
    for (auto& scale : scale_) scale = Buffer<T>(walk.block);
    for (int x = 0; x < 2; ++x)
      if (p_.sides[x].grad_proj) own_[x] = Buffer<T>(b_.width[x] * b_.width[x]);
    if (b_.width[0] && b_.width[1] && any()) mixed_ = Buffer<T>(b_.width[0] * b_.width[1]);
  }
  bool any() const { return p_.sides[0].grad_proj || p_.sides[1].grad_proj; }

  void add(int64_t count) {
    if (!any()) return;
    for (int64_t i = 0; i < count; ++i) {
      const PointGradient& g = walk_.gradients[i];
      scale_[0][i] = static_cast<T>(g.own_s);
      scale_[1][i] = static_cast<T>(g.own_t);
      scale_[2][i] = static_cast<T>(g.mixed);
    }
    for (int x = 0; x < 2; ++x) {
      const int64_t d = b_.width[x];
      if (p_.sides[x].grad_proj)
        gemm(walk_.threads, d, d, count, scaled(x, scale_[x]), walk_.block_of(x), own_[x].get(), d, started_,
             {Band::symmetric});
      if (p_.sides[x].grad_proj && !b_.width[1 - x])  // the other side is unprojected: D is its width
        gemm(walk_.threads, p_.D, d, count, scaled(1 - x, scale_[2]), walk_.block_of(x), dw_[x].data(), d,
             dw_[x].started());
    }
    if (mixed_.get())
      gemm(walk_.threads, b_.width[0], b_.width[1], count, scaled(0, scale_[2]), walk_.block_of(1), mixed_.get(),
           b_.width[1], started_);
    started_ = true;
  }

  void finish() {
    for (int x = 0; x < 2; ++x) {
      const int64_t d = b_.width[x], other = b_.width[1 - x];
      if (!p_.sides[x].grad_proj) continue;
      if (started_) {
        mirror(walk_.threads, d, own_[x].get());
        gemm(walk_.threads, p_.D, d, d, operand<T>(p_.sides[x].proj), operand(own_[x].get(), d), dw_[x].data(), d,
             dw_[x].started());
        const Operand<T> mixed = operand(mixed_.get(), b_.width[1]);
        if (other)
          gemm(walk_.threads, p_.D, d, other, operand<T>(p_.sides[1 - x].proj), x == 1 ? mixed : mixed.transposed(),
               dw_[x].data(), d, true);
      }
      dw_[x].finish(walk_.threads);
    }
  }

 private:
  Operand<T> scaled(int side, const Buffer<T>& scale) const {  // xᵀ with each point scaled
    Operand<T> x = walk_.block_of(side).transposed();
    x.scale = scale.get();
    return x;
  }

  Walk<T>& walk_;
  const Blocks& b_;
  const Alignment& p_;
  Accumulator<T> dw_[2];
  Buffer<T> own_[2], mixed_, scale_[3];
  bool started_ = false;
};

constexpr int64_t kGramRows = 1024;

template <class T>
void gram(const Alignment& p, const Grams& grams, int threads) {
  const Blocks b(p);
  Walk<T> walk(p, kGramRows, threads);
  Moments<T> moments(walk, b);
  const T* G = static_cast<const T*>(grams.matrix.data);
  double* norms = static_cast<double*>(grams.teacher_norms.data);

  // ⟨z_x, z_x⟩ = x G_xx xᵀ. Where x's gradient is wanted too, u = x G_xx; else half the work: x (2·tril(G) − diag).
  struct Side {
    Buffer<T> u, v, half;
    bool full, known;
  } sides[2];
  for (int x = 0; x < 2; ++x) {
    Side& side = sides[x];
    const int64_t d = b.width[x];
    side.full = walk.wants[x].points;
    side.known = x == 1 && grams.norms_known && !side.full;
    if (d && !side.known) side.u = Buffer<T>(walk.block * d);
    if (!d || side.full || side.known) continue;
    side.half = Buffer<T>(d * d);
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < d; ++j)
        side.half[i * d + j] = G[(b.offset[x] + i) * b.K + b.offset[x] + j] * T(i > j ? 2 : i == j);
  }
  // ⟨z_s, z_t⟩ = ⟨v, x⟩ on the side whose gradient wants v; if neither does, on one that has a projection.
  const bool any_points = walk.wants[0].points || walk.wants[1].points;
  auto crosses = [&](int x) { return any_points ? walk.wants[x].points : x == (b.width[0] ? 0 : 1); };
  for (int x = 0; x < 2; ++x)
    if (crosses(x)) sides[x].v = Buffer<T>(walk.block * p.sides[x].points.cols);
  const int at = crosses(0) ? 0 : 1;

  walk.each([&](int64_t begin, int64_t count) {
    for (int x = 0; x < 2; ++x) {
      const int64_t d = b.width[x], y = 1 - x;
      const Operand<T> X = walk.block_of(x);
      if (d && sides[x].full)
        gemm(threads, count, d, d, X, operand(G + b.offset[x] * (b.K + 1), b.K), sides[x].u.get(), d);
      else if (d && !sides[x].known)
        gemm(threads, count, d, d, X, operand(sides[x].half.get(), d), sides[x].u.get(), d, false, {Band::lower});
      if (!crosses(x)) continue;
      const int64_t width = p.sides[x].points.cols;
      const Operand<T> C = !d            ? operand<T>(p.sides[y].proj).transposed()
                           : !b.width[y] ? operand<T>(p.sides[x].proj)
                                         : operand(G + b.offset[y] * b.K + b.offset[x], b.K);
      gemm(threads, count, width, p.sides[y].points.cols, walk.block_of(y), C, sides[x].v.get(), width);
    }
    parallel_chunks(threads, count, kRowGrain, [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) {
        double own[2];
        for (int x = 0; x < 2; ++x) {
          const int64_t d = b.width[x];
          if (sides[x].known) {
            own[x] = norms[begin + i];
            continue;
          }
          own[x] = d ? dot(sides[x].u.get() + i * d, walk.row(x, i), d) : dot(walk.row(x, i), walk.row(x, i), p.D);
          if (d && own[x] < 0) own[x] = 0;  // a square: rounding alone makes it negative
          if (x == 1 && norms) norms[begin + i] = own[x];
        }
        const int64_t width = p.sides[at].points.cols;
        const double mixed = dot(sides[at].v.get() + i * width, walk.row(at, i), width);
        walk.keep(begin, i, cosine_point(own[0], mixed, own[1], p.metric == Metric::angular));
        const PointGradient& g = walk.gradients[i];
        for (int x = 0; x < 2; ++x) {  // ∂x = own u + mixed v, over v
          if (!walk.wants[x].points) continue;
          const int64_t w = p.sides[x].points.cols;
          const T* u = b.width[x] ? sides[x].u.get() + i * w : walk.row(x, i);
          T* v = sides[x].v.get() + i * w;
          const double factor = x == 0 ? g.own_s : g.own_t;
          for (int64_t j = 0; j < w; ++j) v[j] = static_cast<T>(factor * u[j] + g.mixed * v[j]);
          write_row(p.sides[x].grad_points, walk.points.row(begin + i), v);
        }
      }
    });
    walk.add_losses(count);
    moments.add(count);
  });
  moments.finish();
}

// ---- isometric ----------------------------------------------------------------------------------------------------

template <class T>
double factor(const Grams& grams, int threads) {
  return cholesky(threads, grams.matrix.rows, static_cast<T*>(grams.matrix.data));
}

// e = R[s; −t] has the length of z_s − z_t. Its first d_s coordinates meet R's columns of s, all of them those of t.
template <class T>
void isometric(const Alignment& p, const Grams& grams, int threads) {
  const Blocks b(p);
  Walk<T> walk(p, kGramRows, threads);
  Moments<T> moments(walk, b);
  const T* R = static_cast<const T*>(grams.matrix.data);
  const int64_t d_s = b.width[0], d_t = b.width[1], K = b.K;
  Buffer<T> e(walk.block * K), minus(K), dx(walk.block * max(d_s, d_t));
  for (int64_t j = 0; j < K; ++j) minus[j] = T(-1);

  walk.each([&](int64_t begin, int64_t count) {
    Operand<T> teacher = walk.block_of(1);
    teacher.scale = minus.get();
    gemm(threads, count, K, d_t, teacher, operand(R + d_s, K).transposed(), e.get(), K, false, {Band::lower, d_s});
    gemm(threads, count, d_s, d_s, walk.block_of(0), operand(R, K).transposed(), e.get(), K, true, {Band::lower});
    parallel_chunks(threads, count, kRowGrain, [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) {
        T* row = e.get() + i * K;
        walk.keep(begin, i, {dot(row, row, K) / p.D, 2.0 / p.D, -2.0 / p.D, 2.0 / p.D});
        for (int64_t j = 0; j < K; ++j) row[j] = static_cast<T>(walk.gradients[i].own_s * row[j]);
      }
    });
    walk.add_losses(count);
    const Operand<T> de = operand(e.get(), K);
    if (p.sides[0].grad_points)
      multiply_into_rows(walk, p.sides[0].grad_points, begin, count, d_s, de, operand(R, K), dx.get(), {Band::upper});
    if (p.sides[1].grad_points) {
      Operand<T> negative = de;
      negative.scale = minus.get();
      multiply_into_rows(walk, p.sides[1].grad_points, begin, count, K, negative, operand(R + d_s, K), dx.get(),
                         {Band::upper, d_s});
    }
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
      in_type(p.accumulate, [&]<class T>(T) { gram_matrix<T>(p, g, threads); });
    },
    [](const Grams& g, int threads) {
      return in_type(g.matrix.dtype, [&]<class T>(T) { return factor<T>(g, threads); });
    },
    [](const Alignment& p, const Grams& g, int threads) {
      in_type(p.accumulate, [&]<class T>(T) { gram<T>(p, g, threads); });
    },
    [](const Alignment& p, const Grams& g, int threads) {
      in_type(p.accumulate, [&]<class T>(T) { isometric<T>(p, g, threads); });
    },
};

}  // namespace kd::KD_ISA
