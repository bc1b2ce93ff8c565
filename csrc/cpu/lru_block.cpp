#include "kdkernels/lru_block.h"

#include "lane_io.h"
#include "partial.h"
#include "vector_math.h"

namespace kd::KD_ISA {
namespace {

constexpr int kWide = 4;                            // vectors of points that are worked on at once
constexpr int kHigh = kVectorBytes == 64 ? 4 : 2;   // rows of a product's block: kHigh · kWide sums fit the registers
constexpr int64_t kChunk = 1024;                    // rows a task: their sums are in T, beyond that in float64
constexpr int64_t kPartials = 64;                   // of each sum, whatever the number of threads

template <class T>
constexpr int64_t kPoints = kWide * kLanes<T>;

// A tile: H lines of kWide vectors, whose lanes are rows of a tensor.
template <class T>
using Tile = Vector<T>*;

template <class T>
const T* data_of(const View& view) {
  return static_cast<const T*>(view.data);
}

template <int count>
struct Lines {
  static constexpr int lines = count;
};

// Call f(first line, lines) with blocks of `most` lines, and single ones at the end.
template <int most, class F>
inline void for_lines(int64_t H, const F& f) {
  int64_t i = 0;
  for (; i + most <= H; i += most) f(i, Lines<most>{});
  for (; i < H; ++i) f(i, Lines<1>{});
}

// The rows from `from` on, `count` of them; 0 in lanes without one.
template <class T>
inline void read_tile(const T* from, int64_t count, int64_t H, Tile<T> tile) {
  constexpr int L = kLanes<T>;
  for (int w = 0; w < kWide; ++w) {
    const int rows = static_cast<int>(min<int64_t>(L, max<int64_t>(0, count - w * L)));
    for (int64_t k = 0; k < H; k += L) {
      const int cols = static_cast<int>(min<int64_t>(L, H - k));
      Vector<T> lanes[L];
      for (int l = 0; l < L; ++l) lanes[l] = l < rows ? load_first<T>(from + (w * L + l) * H + k, cols) : Vector<T>{};
      transpose_lanes<T>(lanes);
      for (int c = 0; c < cols; ++c) tile[(k + c) * kWide + w] = lanes[c];
    }
  }
}

// As read_tile(), the other way; what lies at `plus`, if anything, is added.
template <class T>
inline void write_tile(T* to, int64_t count, int64_t H, const Vector<T>* tile, const T* plus = nullptr) {
  constexpr int L = kLanes<T>;
  for (int w = 0; w < kWide; ++w) {
    const int rows = static_cast<int>(min<int64_t>(L, max<int64_t>(0, count - w * L)));
    for (int64_t k = 0; k < H; k += L) {
      const int cols = static_cast<int>(min<int64_t>(L, H - k));
      Vector<T> lanes[L];
      for (int c = 0; c < L; ++c) lanes[c] = c < cols ? tile[(k + c) * kWide + w] : Vector<T>{};
      transpose_lanes<T>(lanes);
      for (int l = 0; l < rows; ++l) {
        const int64_t at = (w * L + l) * H + k;
        store_first<T>(to + at, plus ? lanes[l] + load_first<T>(plus + at, cols) : lanes[l], cols);
      }
    }
  }
}

// Zero in the lanes without a row, where there are such: their numbers would enter sums.
template <class T>
inline void clear_rest(int64_t count, int64_t H, Tile<T> tile) {
  for (int64_t p = count; p < kPoints<T>; ++p)
    for (int64_t j = 0; j < H; ++j) tile[j * kWide + p / kLanes<T>][p % kLanes<T>] = 0;
}

// out_i = start(i, w) + Σ_j M_ij x_j, where M_ij lies at i·down + j·along.
template <class T, class S>
inline void multiply(int64_t H, const T* M, int64_t down, int64_t along, const Vector<T>* x, Tile<T> out, const S& start) {
  for_lines<kHigh>(H, [&](int64_t i, auto block) {
    constexpr int lines = decltype(block)::lines;
    Vector<T> sum[lines][kWide];
    for (int r = 0; r < lines; ++r)
      for (int w = 0; w < kWide; ++w) sum[r][w] = start(i + r, w);
    for (int64_t j = 0; j < H; ++j)
      for (int r = 0; r < lines; ++r) {
        const T m = M[(i + r) * down + j * along];
        for (int w = 0; w < kWide; ++w) sum[r][w] += m * x[j * kWide + w];
      }
    for (int r = 0; r < lines; ++r)
      for (int w = 0; w < kWide; ++w) out[(i + r) * kWide + w] = sum[r][w];
  });
}

// sums_ij += a_i b_j, lane by lane.
template <class T>
inline void add_products(int64_t H, const Vector<T>* a, const Vector<T>* b, Vector<T>* sums) {
  for_lines<kHigh>(H, [&](int64_t i, auto block) {
    for_lines<4>(H, [&](int64_t j, auto other) {
      constexpr int lines = decltype(block)::lines, columns = decltype(other)::lines;
      Vector<T> sum[lines][columns];
      for (int r = 0; r < lines; ++r)
        for (int c = 0; c < columns; ++c) sum[r][c] = sums[(i + r) * H + j + c];
      for (int w = 0; w < kWide; ++w)
        for (int r = 0; r < lines; ++r)
          for (int c = 0; c < columns; ++c) sum[r][c] += a[(i + r) * kWide + w] * b[(j + c) * kWide + w];
      for (int r = 0; r < lines; ++r)
        for (int c = 0; c < columns; ++c) sums[(i + r) * H + j + c] = sum[r][c];
    });
  });
}

// sum += the vectors of a line
template <class T>
inline void add_line(const Vector<T>* line, Vector<T>& sum) {
  sum += (line[0] + line[1]) + (line[2] + line[3]);
}

// totals_k += the sum of the lanes of sums_k, which begins anew.
template <class T>
inline void move_sums(int64_t count, Vector<T>* sums, double* totals) {
  constexpr int L = kLanes<T>;
  for (int64_t k = 0; k < count; k += L) {
    const int here = static_cast<int>(min<int64_t>(L, count - k));
    Vector<T> lanes[L];
    for (int c = 0; c < L; ++c) lanes[c] = c < here ? sums[k + c] : Vector<T>{};
    transpose_lanes<T>(lanes);
    for (int s = L / 2; s >= 1; s /= 2)
      for (int l = 0; l < s; ++l) lanes[l] += lanes[l + s];
    for (int c = 0; c < here; ++c) {
      totals[k + c] += double(lanes[0][c]);
      sums[k + c] = Vector<T>{};
    }
  }
}

// Rows to tasks: f(first row, rows, the worker's `tiles` tiles, the worker's sums) for each tile. Returns, if there are
// sums, the total of each over all rows, added in an order that no number of threads changes.
template <class T, class F>
Buffer<double> for_tiles(const View& rows, int tiles, int64_t sums, int64_t work, int threads, const F& f) {
  const int64_t H = rows.cols, chunk = max(kChunk, round_up(ceil_div(rows.rows, kPartials), kPoints<T>));
  const int64_t chunks = ceil_div(rows.rows, chunk), room = tiles * H * kWide + sums;
  threads = static_cast<int>(max<int64_t>(1, min<int64_t>(useful_threads(threads, rows.rows * work), chunks)));
  Buffer<Vector<T>> memory(threads * room);
  Buffer<double> totals(max<int64_t>(1, chunks) * sums);
  parallel_for(threads, chunks, [&](int64_t index, int worker) {
    Tile<T> own = memory.get() + worker * room;
    Vector<T>* sum = own + tiles * H * kWide;
    double* total = totals.get() + index * sums;
    for (int64_t k = 0; k < sums; ++k) sum[k] = Vector<T>{}, total[k] = 0;
    const int64_t end = min(rows.rows, (index + 1) * chunk);
    for (int64_t row = index * chunk, next = row + kChunk; row < end; row += kPoints<T>) {
      if (row >= next) move_sums<T>(sums, sum, total), next = row + kChunk;
      f(row, min(kPoints<T>, end - row), own, sum);
    }
    move_sums<T>(sums, sum, total);
  });
  for (int64_t k = 0; k < sums; ++k) {
    double sum = 0;
    for (int64_t i = 0; i < chunks; ++i) sum += totals[i * sums + k];
    totals[k] = sum;
  }
  return totals;
}

template <class T>
void write_sums(const View& to, const double* totals) {
  if (to)
    for (int64_t k = 0; k < to.rows * to.cols; ++k) static_cast<T*>(to.data)[k] = static_cast<T>(totals[k]);
}

// ---- norm

// x becomes x̂; returns 1/√(variance + ε).
template <class T>
inline Vector<T> standardise(int64_t H, Vector<T>* x, double eps) {
  Vector<T> mean{}, square{};
  for (int64_t j = 0; j < H; ++j) mean += x[j * kWide];
  mean /= static_cast<T>(H);
  for (int64_t j = 0; j < H; ++j) {
    x[j * kWide] -= mean;
    square += x[j * kWide] * x[j * kWide];
  }
  const Vector<T> scale = 1 / square_root<T>(square / static_cast<T>(H) + static_cast<T>(eps));
  for (int64_t j = 0; j < H; ++j) x[j * kWide] *= scale;
  return scale;
}

template <class T>
void norm_of(const NarrowNorm& call, const View& out, int threads) {
  const int64_t H = call.input.cols;
  const T *w = data_of<T>(call.weight), *b = data_of<T>(call.bias);
  for_tiles<T>(call.input, 1, 0, 8 * H, threads, [&](int64_t row, int64_t count, Tile<T> x, Vector<T>*) {
    read_tile(data_of<T>(call.input) + row * H, count, H, x);
    for (int v = 0; v < kWide; ++v) {
      standardise<T>(H, x + v, call.eps);
      for (int64_t j = 0; j < H; ++j) x[j * kWide + v] = x[j * kWide + v] * w[j] + b[j];
    }
    write_tile(static_cast<T*>(out.data) + row * H, count, H, x);
  });
}

template <class T>
void norm_gradients(const NarrowNorm& call, const View& grad, const NarrowNormGradients& to, int threads) {
  const int64_t H = call.input.cols;
  const T* w = data_of<T>(call.weight);
  const bool summing = to.weight || to.bias;
  const auto totals = for_tiles<T>(
      call.input, 2, summing ? 2 * H : 0, 16 * H, threads, [&](int64_t row, int64_t count, Tile<T> x, Vector<T>* sums) {
        Tile<T> g = x + H * kWide;
        read_tile(data_of<T>(call.input) + row * H, count, H, x);
        read_tile(data_of<T>(grad) + row * H, count, H, g);
        for (int v = 0; v < kWide; ++v) {
          const Vector<T> scale = standardise<T>(H, x + v, call.eps);
          Vector<T> mean{}, along{};
          for (int64_t j = 0; j < H; ++j) {
            const Vector<T> arriving = g[j * kWide + v], product = arriving * x[j * kWide + v];
            if (summing) {
              sums[j] += product;
              sums[H + j] += arriving;
            }
            mean += w[j] * arriving;
            along += w[j] * product;
          }
          mean /= static_cast<T>(H);
          along /= static_cast<T>(H);
          for (int64_t j = 0; j < H; ++j)
            x[j * kWide + v] = scale * (w[j] * g[j * kWide + v] - mean - x[j * kWide + v] * along);
        }
        if (to.input) write_tile(static_cast<T*>(to.input.data) + row * H, count, H, x);
      });
  write_sums<T>(to.weight, totals.get());
  write_sums<T>(to.bias, totals.get() + H);
}

// ---- mix

// The factors of a tile's rows, which are the same for all steps of a sequence.
template <class T>
inline void read_mask(const View& mask, int64_t steps, int64_t row, int64_t count, int64_t H, Tile<T> tile) {
  const T* factors = data_of<T>(mask);
  const int64_t first = row / steps;
  if (first == (row + count - 1) / steps) {
    for (int64_t j = 0; j < H; ++j)
      for (int w = 0; w < kWide; ++w) tile[j * kWide + w] = broadcast<T>(factors[first * H + j]);
    return;
  }
  for (int64_t p = 0; p < kPoints<T>; ++p) {
    const T* own = factors + (row + min(p, count - 1)) / steps * H;
    for (int64_t j = 0; j < H; ++j) tile[j * kWide + p / kLanes<T>][p % kLanes<T>] = own[j];
  }
}

// A tile of the call, from y and u up to a and σ(b).
template <class T>
struct Mixing {
  static constexpr int tiles = 6;
  const GatedMix& call;
  int64_t H;
  Tile<T> u, z, slope, a, share, factors;

  Mixing(const GatedMix& call, Tile<T> memory) : call(call), H(call.y.cols) {
    Tile<T>* const parts[tiles] = {&u, &z, &slope, &a, &share, &factors};
    for (int i = 0; i < tiles; ++i) *parts[i] = memory + i * H * kWide;
  }

  // `slope` becomes m₁ ⊙ (Φ(s) + s φ(s)) where it is wanted.
  template <bool sloping>
  void prepare(int64_t row, int64_t count) {
    read_tile(data_of<T>(call.y) + row * H, count, H, z);
    read_tile(data_of<T>(call.u) + row * H, count, H, u);
    if (call.inner) read_mask<T>(call.inner, call.steps, row, count, H, factors);
    const T* D = data_of<T>(call.D);
    for (int64_t j = 0; j < H; ++j)
      for (int64_t k = j * kWide; k < (j + 1) * kWide; ++k) {
        const Vector<T> s = z[k] + D[j] * u[k];
        const Normal<T> n = normal(s);
        z[k] = s * n.cumulative;
        if (sloping) slope[k] = n.cumulative + s * n.density;
        if (call.inner) {
          z[k] *= factors[k];
          if (sloping) slope[k] *= factors[k];
        }
      }
    product(call.value, call.value_bias, a);
    product(call.gate, call.gate_bias, share);
    for (int64_t k = 0; k < H * kWide; ++k) share[k] = logistic<T>(share[k]);
    if (call.outer) read_mask<T>(call.outer, call.steps, row, count, H, factors);
  }

  void product(const View& M, const View& bias, Tile<T> out) const {
    const T* start = data_of<T>(bias);
    multiply<T>(H, data_of<T>(M), H, 1, z, out, [&](int64_t i, int) { return broadcast<T>(start[i]); });
  }
};

template <class T>
void mix_of(const GatedMix& call, const View& x, const View& out, int threads) {
  const int64_t H = call.y.cols, work = 2 * H * H + 60 * H;
  for_tiles<T>(call.y, Mixing<T>::tiles, 0, work, threads, [&](int64_t row, int64_t count, Tile<T> memory, Vector<T>*) {
    Mixing<T> mixing(call, memory);
    mixing.template prepare<false>(row, count);
    for (int64_t k = 0; k < H * kWide; ++k) {
      mixing.a[k] *= mixing.share[k];
      if (call.outer) mixing.a[k] *= mixing.factors[k];
    }
    write_tile(static_cast<T*>(out.data) + row * H, count, H, mixing.a, data_of<T>(x) + row * H);
  });
}

template <class T>
void mix_gradients(const GatedMix& call, const View& grad, const GatedMixGradients& to, int threads) {
  const int64_t H = call.y.cols, work = 6 * H * H + 80 * H;
  // where the sums of each gradient begin: ∂V, ∂G, ∂v, ∂g, ∂D
  const int64_t gate = H * H, value_bias = 2 * H * H, gate_bias = value_bias + H, feedthrough = gate_bias + H;
  const bool summing = to.value || to.gate || to.value_bias || to.gate_bias || to.D;
  const auto step = [&](int64_t row, int64_t count, Tile<T> memory, Vector<T>* sums) {
    Mixing<T> mixing(call, memory);
    mixing.template prepare<true>(row, count);
    const Tile<T> u = mixing.u, z = mixing.z, slope = mixing.slope, a = mixing.a, share = mixing.share;
    const Tile<T> factors = mixing.factors;
    Tile<T> g = memory + Mixing<T>::tiles * H * kWide;
    read_tile(data_of<T>(grad) + row * H, count, H, g);
    for (int64_t k = 0; k < H * kWide; ++k) {
      const Vector<T> arriving = (call.outer ? g[k] * factors[k] : g[k]) * share[k];
      share[k] = arriving * a[k] * (1 - share[k]);
      a[k] = arriving;
    }
    clear_rest<T>(count, H, a);
    clear_rest<T>(count, H, share);
    clear_rest<T>(count, H, z);
    if (to.value) add_products<T>(H, a, z, sums);
    if (to.gate) add_products<T>(H, share, z, sums + gate);
    for (int64_t j = 0; summing && j < H; ++j) {
      add_line<T>(a + j * kWide, sums[value_bias + j]);
      add_line<T>(share + j * kWide, sums[gate_bias + j]);
    }
    if (!to.y && !to.u && !to.D) return;
    multiply<T>(H, data_of<T>(call.value), 1, H, a, g, [](int64_t, int) { return Vector<T>{}; });
    multiply<T>(H, data_of<T>(call.gate), 1, H, share, g, [&](int64_t i, int w) { return g[i * kWide + w]; });
    for (int64_t k = 0; k < H * kWide; ++k) g[k] *= slope[k];
    if (to.y) write_tile(static_cast<T*>(to.y.data) + row * H, count, H, g);
    if (to.D) {
      for (int64_t k = 0; k < H * kWide; ++k) u[k] *= g[k];
      clear_rest<T>(count, H, u);
      for (int64_t j = 0; j < H; ++j) add_line<T>(u + j * kWide, sums[feedthrough + j]);
    }
    if (!to.u) return;
    const T* D = data_of<T>(call.D);
    for (int64_t j = 0; j < H; ++j)
      for (int w = 0; w < kWide; ++w) g[j * kWide + w] *= D[j];
    write_tile(static_cast<T*>(to.u.data) + row * H, count, H, g);
  };
  const auto totals =
      for_tiles<T>(call.y, Mixing<T>::tiles + 1, summing ? feedthrough + H : 0, work, threads, step);
  write_sums<T>(to.value, totals.get());
  write_sums<T>(to.gate, totals.get() + gate);
  write_sums<T>(to.value_bias, totals.get() + value_bias);
  write_sums<T>(to.gate_bias, totals.get() + gate_bias);
  write_sums<T>(to.D, totals.get() + feedthrough);
}

template <class F>
void with_float(const View& view, const F& f) {
  view.dtype == DType::float64 ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

void norm(const NarrowNorm& call, const View& out, int threads) {
  with_float(out, [&]<class T>(T*) { norm_of<T>(call, out, threads); });
}
void norm_backward(const NarrowNorm& call, const View& grad, const NarrowNormGradients& to, int threads) {
  with_float(grad, [&]<class T>(T*) { norm_gradients<T>(call, grad, to, threads); });
}
void mix(const GatedMix& call, const View& x, const View& out, int threads) {
  with_float(out, [&]<class T>(T*) { mix_of<T>(call, x, out, threads); });
}
void mix_backward(const GatedMix& call, const View& grad, const GatedMixGradients& to, int threads) {
  with_float(grad, [&]<class T>(T*) { mix_gradients<T>(call, grad, to, threads); });
}

}  // namespace

extern const LruBlockKernels lru_block;
const LruBlockKernels lru_block{&norm, &norm_backward, &mix, &mix_backward};

}  // namespace kd::KD_ISA
