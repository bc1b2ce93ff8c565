#include "kdkernels/linear_distillation.h"

#include "gemm_bf16.h"
#include "rows.h"
#include "vector_math.h"

namespace kd::KD_ISA {
namespace {

constexpr double kInfinity = __builtin_inf();

template <class T>
constexpr Vector<T> all(double x) {
  return static_cast<T>(x) - Vector<T>{};
}

// ---- rows ---------------------------------------------------------------------------------------------------------

// f(j, count) for each vector of a row: `count` elements from j on, less than a whole vector at the end.
template <class T, class F>
inline void each_vector(int64_t cols, F&& f) {
  for (int64_t j = 0; j < cols; j += kLanes<T>) f(j, min<int64_t>(kLanes<T>, cols - j));
}

template <class T, class S>
inline Vector<T> read(const S* p, int64_t stride, int64_t count, double fill) {
  if (count == kLanes<T> && stride == 1) return load_vector<T>(p);
  Vector<T> v = all<T>(fill);
  for (int64_t l = 0; l < count; ++l) v[l] = load<T>(p + l * stride);
  return v;
}

template <class T>
inline void write(T* p, int64_t count, Vector<T> v) {
  if (count == kLanes<T>)
    *reinterpret_cast<UnalignedVector<T>*>(p) = v;
  else
    for (int64_t l = 0; l < count; ++l) p[l] = v[l];
}

// Sums over a row of what f(j, sums) adds to vectors; long sums run in double. `cols` is whole vectors.
template <int count, class T, class F>
inline void sum_over(int64_t cols, double (&sums)[count], F&& f) {
  constexpr int64_t chunk = 32 * kLanes<T>;
  for (double& s : sums) s = 0;
  for (int64_t j0 = 0; j0 < cols; j0 += chunk) {
    Vector<T> partial[count] = {};
    for (int64_t j = j0; j < min(cols, j0 + chunk); j += kLanes<T>) f(j, partial);
    for (int c = 0; c < count; ++c) sums[c] += total<T>(partial[c]);
  }
}

// NaN aside: it shows in every sum.
template <class T>
inline T largest(const T* row, int64_t cols) {
  Vector<T> most = all<T>(-kInfinity);
  for (int64_t j = 0; j < cols; j += kLanes<T>) {
    const Vector<T> v = *reinterpret_cast<const Vector<T>*>(row + j);
    most = most < v ? v : most;
  }
  T found = most[0];
  for (int l = 1; l < kLanes<T>; ++l) found = max(found, T(most[l]));
  return found;
}

// A row of logits, in whole vectors: what is beyond its end, or excluded, is −∞.
template <class T>
void read_logits(const Logits& logits, int64_t row, int64_t cols, const View* excluded, T* out) {
  const T scale = static_cast<T>(logits.scale), cap = static_cast<T>(logits.softcap);
  const View &x = logits.rows, &bias = logits.bias;
  with_type(x.dtype, [&]<class S>(S*) {
    const S* from = static_cast<const S*>(x.data) + row * x.row_stride;
    each_vector<T>(cols, [&](int64_t j, int64_t count) {
      Vector<T> v = read<T>(from + j * x.col_stride, x.col_stride, count, -kInfinity);
      *reinterpret_cast<Vector<T>*>(out + j) = v;
    });
  });
  if (!bias && scale == 1 && cap == 0 && !excluded) return;
  with_type(bias.dtype, [&]<class B>(B*) {
    const B* offset = static_cast<const B*>(bias.data);
    each_vector<T>(cols, [&](int64_t j, int64_t count) {
      Vector<T>& v = *reinterpret_cast<Vector<T>*>(out + j);
      if (bias) v += read<T>(offset + j * bias.row_stride, bias.row_stride, count, 0);
      if (scale != 1) v *= scale;
      if (cap != 0) v = cap * tanh(v / cap);
      if (excluded)
        v = read<T>(static_cast<const T*>(excluded->data) + j * excluded->row_stride, excluded->row_stride, count, 1) ==
                    all<T>(0)
                ? v
                : all<T>(-kInfinity);
      for (int64_t l = count; l < kLanes<T>; ++l) v[l] = static_cast<T>(-kInfinity);
    });
  });
}

// A row whose elements, less `top` and times `factor`, are logits at the temperature, and the sum of their
// exponentials.
template <class T>
struct Tempered {
  const T* row;
  T top, factor, log_sum = 0;  // log Σ exp, once it is known

  Vector<T> at(int64_t j) const { return (*reinterpret_cast<const Vector<T>*>(row + j) - top) * factor; }
  Vector<T> log_at(int64_t j) const { return at(j) - log_sum; }
};

template <class T>
Tempered<T> tempered(const T* row, int64_t cols, double factor) {
  return {row, largest(row, cols), static_cast<T>(factor)};
}

template <class T>
double sum_of_exponentials(const Tempered<T>& x, int64_t cols) {
  double sum[1];
  sum_over<1, T>(cols, sum, [&](int64_t j, Vector<T>* s) { s[0] += exp_negative(x.at(j)); });
  return sum[0];
}

// ---- the mixture of teachers --------------------------------------------------------------------------------------

// A teacher's part in a mixture, from its logits in `row`: π_k y/T up to a number, or log π_k + log softmax(y/T).
template <class T>
struct Part {
  Part(const LinearDistillation& p, const Logits& teacher, const T* row, int64_t cols)
      : x(tempered(row, cols, 1 / p.temperature)), share(p.geometric ? teacher.share : 1) {
    if (!p.geometric)
      offset = static_cast<T>(__builtin_log(teacher.share) - __builtin_log(sum_of_exponentials(x, cols)));
  }
  Vector<T> at(int64_t j) const { return x.at(j) * share + offset; }
  Tempered<T> x;
  T share, offset = 0;
};

template <class T>
Vector<T> mixed(bool geometric, Vector<T> before, Vector<T> part) {
  return geometric ? before + part : log_add<T>(before, part);
}

// f(row, scratch) on threads, with `rows` padded rows of scratch.
template <class T, class F>
void each_row(int threads, int64_t count, int64_t cols, int64_t rows, F&& f) {
  const int64_t padded = round_up(cols, kLanes<T>);
  threads = useful_threads(threads, count * cols * 40);
  Buffer<T> scratch(threads * rows * padded);
  const int64_t grain = max<int64_t>(1, 8192 / max<int64_t>(cols, 1));
  parallel_for(threads, ceil_div(count, grain), [&](int64_t chunk, int worker) {
    for (int64_t i = chunk * grain; i < min(count, (chunk + 1) * grain); ++i)
      f(i, scratch.get() + worker * rows * padded);
  });
}

template <class T>
void absorb(const LinearDistillation& p, const Logits& teacher, bool first, int threads) {
  const int64_t V = p.mixture.cols, padded = round_up(V, kLanes<T>);
  each_row<T>(threads, p.mixture.rows, V, 1, [&](int64_t i, T* row) {
    read_logits<T>(teacher, i, V, p.excluded ? &p.excluded : nullptr, row);
    const Part<T> part(p, teacher, row, padded);
    T* to = static_cast<T*>(p.mixture.data) + i * p.mixture.row_stride;
    each_vector<T>(V, [&](int64_t j, int64_t count) {
      const Vector<T> x = part.at(j);
      write(to + j, count, first ? x : mixed<T>(p.geometric, read<T>(to + j, 1, count, 0), x));
    });
  });
}

// ---- the divergence -----------------------------------------------------------------------------------------------

// A column's part of the loss, q, and ∂/∂q of the divergence.
template <class T>
struct Element {
  Vector<T> loss, q, slope;
};

template <Divergence kind, class T>
inline Element<T> element(Vector<T> log_p, Vector<T> log_q, T beta, T log_beta, T log_rest) {
  const Vector<T> zero{}, p = exp_negative(log_p), q = exp_negative(log_q);
  if constexpr (kind == Divergence::reverse_kl) {
    const Vector<T> slope = q == zero ? zero : log_q - log_p;
    return {q * slope, q, slope};
  }
  if constexpr (kind == Divergence::jsd) {
    const Vector<T> log_m = log_add<T>(log_p + log_beta, log_q + log_rest);
    const Vector<T> slope = q == zero ? zero : (1 - beta) * (log_q - log_m);
    return {(p == zero ? zero : beta * p * (log_p - log_m)) + q * slope, q, slope};
  }
  const Vector<T> difference = q - p, half = all<T>(0.5);
  const Vector<T> sign = difference < zero ? -half : difference > zero ? half : difference;  // NaN stays
  return {sign * difference, q, sign};
}

template <Divergence kind, class T>
void diverge_row(const LinearDistillation& p, const Logits& teacher, int64_t i, T* scratch) {
  const int64_t V = p.student.rows.cols, cols = round_up(V, kLanes<T>);
  const View* excluded = p.excluded ? &p.excluded : nullptr;
  const T inverse = static_cast<T>(1 / p.temperature);
  T *s = scratch, *t = scratch + cols, *y = excluded ? scratch + 2 * cols : s;
  const double weight =
      (p.weights ? double(static_cast<const T*>(p.weights.data)[i * p.weights.row_stride]) : 1) / p.divisor;

  read_logits<T>(p.student, i, V, nullptr, y);
  if (excluded) read_logits<T>(p.student, i, V, excluded, s);
  read_logits<T>(teacher, i, V, excluded, t);
  double factor = 1 / p.temperature;
  if (p.mixture) {
    const Part<T> part(p, teacher, t, cols);
    const T* before = static_cast<const T*>(p.mixture.data) + i * p.mixture.row_stride;
    each_vector<T>(V, [&](int64_t j, int64_t count) {
      const Vector<T> x = mixed<T>(p.geometric, read<T>(before + j, 1, count, -kInfinity), part.at(j));
      *reinterpret_cast<Vector<T>*>(t + j) = x;
    });
    factor = 1;
  }

  // log Σ exp of both, and the loss where it needs no more
  Tempered<T> q = tempered(s, cols, inverse), target = tempered(t, cols, factor);
  double sums[3];
  sum_over<3, T>(cols, sums, [&](int64_t j, Vector<T>* sum) {
    const Vector<T> a = target.at(j), b = q.at(j), e = exp_negative(a);
    sum[0] += exp_negative(b);
    sum[1] += e;
    if constexpr (kind == Divergence::forward_kl) sum[2] += e == Vector<T>{} ? Vector<T>{} : e * (a - b);
  });
  const double log_q = __builtin_log(sums[0]), log_p = __builtin_log(sums[1]);
  q.log_sum = static_cast<T>(log_q);
  target.log_sum = static_cast<T>(log_p);
  double divergence = sums[2] / sums[1] - log_p + log_q, mean = 0;  // mean = Σ q slope
  if constexpr (kind != Divergence::forward_kl) {
    const T beta = static_cast<T>(p.beta), log_beta = static_cast<T>(__builtin_log(p.beta)),
            log_rest = static_cast<T>(__builtin_log1p(-p.beta));
    double found[3];
    sum_over<3, T>(cols, found, [&](int64_t j, Vector<T>* sum) {
      const Element<T> e = element<kind, T>(target.log_at(j), q.log_at(j), beta, log_beta, log_rest);
      sum[0] += e.loss;
      sum[1] += e.q * e.slope;
      sum[2] += e.q;
      *reinterpret_cast<Vector<T>*>(t + j) = e.slope;
    });
    divergence = found[0];
    mean = found[1] / found[2];  // so that gradients sum to 0 as if q summed to 1
  }

  // hard labels: at temperature 1, of all columns
  const bool hard = p.alpha != 1, soft = p.alpha != 0;
  Tempered<T> own = tempered(y, cols, 1);
  const int64_t label = hard ? p.labels.data[i] : 0;
  double loss = soft ? p.alpha * p.temperature * p.temperature * divergence : 0;
  if (hard) {
    const double log_sum = __builtin_log(p.temperature == 1 && !excluded ? sums[0] : sum_of_exponentials(own, cols));
    own.log_sum = static_cast<T>(log_sum);
    loss += (1 - p.alpha) * (log_sum - (double(y[label]) - own.top));
  }
  loss *= weight;
  if (p.losses)
    with_type(p.losses.dtype,
              [&]<class S>(S*) { store(static_cast<S*>(p.losses.data) + i * p.losses.row_stride, loss); });
  if (!p.gradient) return;

  T* to = static_cast<T*>(p.student.rows.data) + i * p.student.rows.row_stride;
  const T soft_weight = static_cast<T>(weight * p.alpha * p.temperature),
          hard_weight = static_cast<T>(weight * (1 - p.alpha));
  const T all_slopes = static_cast<T>(mean), cap = static_cast<T>(p.student.softcap),
          scale = static_cast<T>(p.student.scale);
  each_vector<T>(V, [&](int64_t j, int64_t count) {
    Vector<T> g{};
    if (soft) {
      const Vector<T> probability = exp_negative(q.log_at(j));
      if constexpr (kind == Divergence::forward_kl)
        g = soft_weight * (probability - exp_negative(target.log_at(j)));
      else  // a slope less the mean first: where the student is certain, they nearly cancel
        g = soft_weight * (probability * (*reinterpret_cast<const Vector<T>*>(t + j) - all_slopes));
    }
    if (hard) {
      g += hard_weight * exp_negative(own.log_at(j));
      if (label >= j && label < j + count) g[label - j] -= hard_weight;
    }
    if (cap != 0) {
      const Vector<T> u = *reinterpret_cast<const Vector<T>*>(y + j) / cap;
      g *= (1 - u) * (1 + u);
    }
    if (scale != 1) g *= scale;
    write(to + j, count, g);
  });
}

template <Divergence kind, class T>
void diverge(const LinearDistillation& p, const Logits& teacher, int threads) {
  const View& x = p.student.rows;
  each_row<T>(threads, x.rows, x.cols, 3, [&](int64_t i, T* scratch) { diverge_row<kind, T>(p, teacher, i, scratch); });
  if (!p.total) return;
  double& sum = *static_cast<double*>(p.total.data);
  with_type(p.losses.dtype, [&]<class S>(S*) {
    for (int64_t i = 0; i < x.rows; ++i)
      sum += load<double>(static_cast<const S*>(p.losses.data) + i * p.losses.row_stride);
  });
}

template <class F>
void with_accumulate(DType dtype, F&& f) {
  if (dtype == DType::float64)
    f(static_cast<double*>(nullptr));
  else
    f(static_cast<float*>(nullptr));
}

void run_absorb(const LinearDistillation& p, const Logits& teacher, bool first, int threads) {
  with_accumulate(p.accumulate, [&]<class T>(T*) { absorb<T>(p, teacher, first, threads); });
}

void run_diverge(const LinearDistillation& p, const Logits& teacher, int threads) {
  with_accumulate(p.accumulate, [&]<class T>(T*) {
    switch (p.divergence) {
      case Divergence::forward_kl:
        return diverge<Divergence::forward_kl, T>(p, teacher, threads);
      case Divergence::reverse_kl:
        return diverge<Divergence::reverse_kl, T>(p, teacher, threads);
      case Divergence::jsd:
        return diverge<Divergence::jsd, T>(p, teacher, threads);
      case Divergence::tvd:
        return diverge<Divergence::tvd, T>(p, teacher, threads);
    }
  });
}

void multiply(const View& A, const View& B, const View& C, bool accumulate, const Bf16Tile* tile, int threads) {
  with_accumulate(C.dtype, [&]<class T>(T*) {
    T* to = static_cast<T*>(C.data);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == sizeof(float))
      if (tile)
        return gemm_bf16(*tile, threads, C.rows, C.cols, A.cols, operand<T>(A), 1, operand<T>(B), to, C.row_stride,
                         accumulate);
#else
    (void)tile;
#endif
    gemm(threads, C.rows, C.cols, A.cols, operand<T>(A), operand<T>(B), to, C.row_stride, accumulate);
  });
}

}  // namespace

extern const LinearDistillationKernels linear_distillation;
const LinearDistillationKernels linear_distillation = {run_absorb, run_diverge, multiply};

}  // namespace kd::KD_ISA
