#include "kdkernels/lru_block.h"

#include "lane_io.h"
#include "partial.h"
#include "vector_math.h"

namespace kd::KD_ISA {
namespace {

constexpr int kWide = 4;                           // vectors of points that are worked on at once
constexpr int kHigh = kVectorBytes == 64 ? 4 : 2;  // rows of a product's block: kHigh · kWide sums fit the registers
constexpr int64_t kChunk = 1024;                   // rows a task: their sums are in T, beyond that in float64
constexpr int64_t kPartials = 64;                  // of each sum, whatever the number of threads

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

// The lines of a tile: so many that its transposition needs no bound. Those behind H are 0.
template <class T>
int64_t height(int64_t H) {
  return round_up(H, kLanes<T>);
}

// kPoints rows from `from` on.
template <class T>
inline void read_whole(const T* from, int64_t H, Tile<T> tile) {
  constexpr int L = kLanes<T>;
  for (int w = 0; w < kWide; ++w, from += L * H)
    for (int64_t k = 0; k < H; k += L) {
      const int cols = static_cast<int>(min<int64_t>(L, H - k));
      Vector<T> lanes[L];
      for (int l = 0; l < L; ++l) lanes[l] = load_first<T>(from + l * H + k, cols);
      transpose_lanes<T>(lanes);
      for (int c = 0; c < L; ++c) tile[(k + c) * kWide + w] = lanes[c];
    }
}

// As read_whole(), the other way; what lies at `plus`, if anything, is added.
template <class T>
inline void write_whole(T* to, int64_t H, const Vector<T>* tile, const T* plus) {
  constexpr int L = kLanes<T>;
  for (int w = 0; w < kWide; ++w, to += L * H, plus += plus ? L * H : 0)
    for (int64_t k = 0; k < H; k += L) {
      const int cols = static_cast<int>(min<int64_t>(L, H - k));
      Vector<T> lanes[L];
      for (int c = 0; c < L; ++c) lanes[c] = tile[(k + c) * kWide + w];
      transpose_lanes<T>(lanes);
      if (plus)
        for (int l = 0; l < L; ++l) lanes[l] += load_first<T>(plus + l * H + k, cols);
      for (int l = 0; l < L; ++l) store_first<T>(to + l * H + k, lanes[l], cols);
    }
}

// The rows of a task: its tiles, but the last one, are whole, and that one goes by way of `staged` memory.
template <class T>
struct Rows {
  int64_t first, count, H;
  T* staged;

  // 0 in lanes without a row.
  void read(const View& view, Tile<T> tile) const {
    const T* from = static_cast<const T*>(view.data) + first * H;
    if (count == kPoints<T>) return read_whole(from, H, tile);
    for (int64_t k = 0; k < kPoints<T> * H; ++k) staged[k] = k < count * H ? from[k] : T{};
    read_whole<T>(staged, H, tile);
  }
  void write(const View& view, const Vector<T>* tile, const View& plus = {}) const {
    T* to = static_cast<T*>(view.data) + first * H;
    const T* more = plus ? static_cast<const T*>(plus.data) + first * H : nullptr;
    if (count == kPoints<T>) return write_whole(to, H, tile, more);
    write_whole<T>(staged, H, tile, nullptr);
    for (int64_t k = 0; k < count * H; ++k) to[k] = more ? staged[k] + more[k] : staged[k];
  }
  // Zero in the lanes without a row: their numbers would enter sums.
  void clear_rest(Tile<T> tile) const {
    for (int64_t p = count; p < kPoints<T>; ++p)
      for (int64_t j = 0; j < H; ++j) tile[j * kWide + p / kLanes<T>][p % kLanes<T>] = 0;
  }
};

// out_i = start(i, w) + Σ_j M_ij x_j, where M_ij lies at i·down + j·along.
template <class T, class S>
inline void multiply(int64_t H, const T* M, int64_t down, int64_t along, const Vector<T>* x, Tile<T> out,
                     const S& start) {
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
  for (int64_t k = 0; k < count; ++k) {
    totals[k] += total<T>(sums[k]);
    sums[k] = Vector<T>{};
  }
}

// Rows to tasks: f(rows, the worker's `tiles` tiles, the worker's sums) for each tile. Returns, if there are sums, the
// total of each over all rows, added in an order that no number of threads changes.
template <class T, class F>
Buffer<double> for_tiles(const View& rows, int tiles, int64_t sums, int64_t work, int threads, const F& f) {
  const int64_t H = rows.cols, chunk = max(kChunk, round_up(ceil_div(rows.rows, kPartials), kPoints<T>));
  const int64_t chunks = ceil_div(rows.rows, chunk), tile = height<T>(H) * kWide, room = (tiles + 1) * tile + sums;
  threads = static_cast<int>(max<int64_t>(1, min<int64_t>(useful_threads(threads, rows.rows * work), chunks)));
  Buffer<Vector<T>> memory(threads * room);
  Buffer<double> totals(max<int64_t>(1, chunks) * sums);
  parallel_for(threads, chunks, [&](int64_t index, int worker) {
    Tile<T> own = memory.get() + worker * room;
    Vector<T>* const sum = own + (tiles + 1) * tile;
    T* const staged = reinterpret_cast<T*>(own + tiles * tile);
    double* total = totals.get() + index * sums;
    for (int64_t k = 0; k < room; ++k) own[k] = Vector<T>{};
    for (int64_t k = 0; k < sums; ++k) total[k] = 0;
    const int64_t end = min(rows.rows, (index + 1) * chunk);
    for (int64_t row = index * chunk, next = row + kChunk; row < end; row += kPoints<T>) {
      if (row >= next) move_sums<T>(sums, sum, total), next = row + kChunk;
      f(Rows<T>{row, min(kPoints<T>, end - row), H, staged}, own, sum);
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

// x becomes x̂; returns 1/√(variance + ε). All vectors of a line go on together: none waits for the sum of another.
template <class T>
struct Scales {
  Vector<T> of[kWide];

  Scales(int64_t H, Tile<T> x, double eps) {
    Vector<T> mean[kWide]{}, square[kWide]{};
    for (int64_t j = 0; j < H; ++j)
      for (int w = 0; w < kWide; ++w) mean[w] += x[j * kWide + w];
    for (int w = 0; w < kWide; ++w) mean[w] /= static_cast<T>(H);
    for (int64_t j = 0; j < H; ++j)
      for (int w = 0; w < kWide; ++w) {
        const Vector<T> apart = x[j * kWide + w] - mean[w];
        square[w] += apart * apart;
        x[j * kWide + w] = apart;
      }
    for (int w = 0; w < kWide; ++w) of[w] = 1 / square_root<T>(square[w] / static_cast<T>(H) + static_cast<T>(eps));
    for (int64_t j = 0; j < H; ++j)
      for (int w = 0; w < kWide; ++w) x[j * kWide + w] *= of[w];
  }
};

template <class T>
void norm_of(const NarrowNorm& call, const View& out, int threads) {
  const int64_t H = call.input.cols;
  const T *weight = data_of<T>(call.weight), *bias = data_of<T>(call.bias);
  for_tiles<T>(call.input, 1, 0, 8 * H, threads, [&](const Rows<T>& rows, Tile<T> x, Vector<T>*) {
    rows.read(call.input, x);
    Scales<T>(H, x, call.eps);
    for (int64_t j = 0; j < H; ++j)
      for (int w = 0; w < kWide; ++w) x[j * kWide + w] = x[j * kWide + w] * weight[j] + bias[j];
    rows.write(out, x);
  });
}

template <class T>
void norm_gradients(const NarrowNorm& call, const View& grad, const NarrowNormGradients& to, int threads) {
  const int64_t H = call.input.cols;
  const T* weight = data_of<T>(call.weight);
  const bool summing = to.weight || to.bias;
  const auto step = [&](const Rows<T>& rows, Tile<T> x, Vector<T>* sums) {
    Tile<T> g = x + height<T>(H) * kWide;
    rows.read(call.input, x);
    rows.read(grad, g);
    const Scales<T> scales(H, x, call.eps);
    Vector<T> mean[kWide]{}, along[kWide]{};
    for (int64_t j = 0; j < H; ++j) {
      Vector<T> product[kWide];
      for (int w = 0; w < kWide; ++w) product[w] = g[j * kWide + w] * x[j * kWide + w];
      if (summing) {
        add_line<T>(product, sums[j]);
        add_line<T>(g + j * kWide, sums[H + j]);
      }
      for (int w = 0; w < kWide; ++w) {
        g[j * kWide + w] *= weight[j];
        mean[w] += g[j * kWide + w];
        along[w] += weight[j] * product[w];
      }
    }
    if (!to.input) return;
    for (int w = 0; w < kWide; ++w) {
      mean[w] /= static_cast<T>(H);
      along[w] /= static_cast<T>(H);
    }
    for (int64_t j = 0; j < H; ++j)
      for (int w = 0; w < kWide; ++w)
        x[j * kWide + w] = scales.of[w] * (g[j * kWide + w] - mean[w] - x[j * kWide + w] * along[w]);
    rows.write(to.input, x);
  };
  const auto totals = for_tiles<T>(call.input, 2, summing ? 2 * H : 0, 16 * H, threads, step);
  write_sums<T>(to.weight, totals.get());
  write_sums<T>(to.bias, totals.get() + H);
}

// ---- mix

// The factors of a tile's rows, which are the same for all steps of a sequence.
template <class T>
inline void read_mask(const View& mask, int64_t steps, const Rows<T>& rows, Tile<T> tile) {
  const T* factors = data_of<T>(mask);
  const int64_t H = rows.H, last = rows.first + rows.count - 1, sequence = rows.first / steps;
  if (sequence == last / steps) {
    for (int64_t j = 0; j < H; ++j)
      for (int w = 0; w < kWide; ++w) tile[j * kWide + w] = broadcast<T>(factors[sequence * H + j]);
    return;
  }
  for (int64_t p = 0; p < kPoints<T>; ++p) {
    const T* own = factors + min(rows.first + p, last) / steps * H;
    for (int64_t j = 0; j < H; ++j) tile[j * kWide + p / kLanes<T>][p % kLanes<T>] = own[j];
  }
}

// A tile of the call, from y and u up to a and σ(b).
template <class T>
struct Mixing {
  static constexpr int tiles = 6;
  const GatedMix& call;
  int64_t H, count;  // vectors of a tile
  Tile<T> u, z, slope, a, share, factors;

  Mixing(const GatedMix& call, Tile<T> memory) : call(call), H(call.y.cols), count(H * kWide) {
    Tile<T>* const parts[tiles] = {&u, &z, &slope, &a, &share, &factors};
    for (int i = 0; i < tiles; ++i) *parts[i] = memory + i * height<T>(H) * kWide;
  }

  // `slope` becomes m₁ ⊙ (Φ(s) + s φ(s)) where it is wanted.
  template <bool sloping>
  void prepare(const Rows<T>& rows) {
    rows.read(call.y, z);
    rows.read(call.u, u);
    const T* D = data_of<T>(call.D);
    for (int64_t j = 0; j < H; ++j)
      for (int64_t k = j * kWide; k < (j + 1) * kWide; ++k) {
        const Vector<T> s = z[k] + D[j] * u[k];
        const Normal<T> n = normal(s);
        z[k] = s * n.cumulative;
        if (sloping) slope[k] = n.cumulative + s * n.density;
      }
    if (call.inner) {
      read_mask<T>(call.inner, call.steps, rows, factors);
      times(factors, z);
      if (sloping) times(factors, slope);
    }
    product(call.value, call.value_bias, a);
    product(call.gate, call.gate_bias, share);
    for (int64_t k = 0; k < count; ++k) share[k] = logistic<T>(share[k]);
    if (call.outer) read_mask<T>(call.outer, call.steps, rows, factors);
  }

  void product(const View& M, const View& bias, Tile<T> out) const {
    const T* start = data_of<T>(bias);
    multiply<T>(H, data_of<T>(M), H, 1, z, out, [&](int64_t i, int) { return broadcast<T>(start[i]); });
  }
  void times(const Vector<T>* x, Tile<T> y) const {
    for (int64_t k = 0; k < count; ++k) y[k] *= x[k];
  }
};

template <class T>
void mix_of(const GatedMix& call, const View& x, const View& out, int threads) {
  const int64_t H = call.y.cols, work = 2 * H * H + 60 * H;
  for_tiles<T>(call.y, Mixing<T>::tiles, 0, work, threads, [&](const Rows<T>& rows, Tile<T> memory, Vector<T>*) {
    Mixing<T> mixing(call, memory);
    mixing.template prepare<false>(rows);
    mixing.times(mixing.share, mixing.a);
    if (call.outer) mixing.times(mixing.factors, mixing.a);
    rows.write(out, mixing.a, x);
  });
}

template <class T>
void mix_gradients(const GatedMix& call, const View& grad, const GatedMixGradients& to, int threads) {
  const int64_t H = call.y.cols, work = 6 * H * H + 80 * H;
  // where the sums of each gradient begin: ∂V, ∂G, ∂v, ∂g, ∂D
  const int64_t gate = H * H, value_bias = 2 * H * H, gate_bias = value_bias + H, feedthrough = gate_bias + H;
  const bool summing = to.value || to.gate || to.value_bias || to.gate_bias || to.D;
  const auto step = [&](const Rows<T>& rows, Tile<T> memory, Vector<T>* sums) {
    Mixing<T> mixing(call, memory);
    mixing.template prepare<true>(rows);
    const Tile<T> u = mixing.u, z = mixing.z, a = mixing.a, share = mixing.share;
    const Tile<T> g = memory + Mixing<T>::tiles * height<T>(H) * kWide;
    rows.read(grad, g);
    if (call.outer) mixing.times(mixing.factors, g);
    for (int64_t k = 0; k < mixing.count; ++k) {
      const Vector<T> arriving = g[k] * share[k];
      share[k] = arriving * a[k] * (1 - share[k]);
      a[k] = arriving;
    }
    rows.clear_rest(a);
    rows.clear_rest(share);
    rows.clear_rest(z);
    if (to.value) add_products<T>(H, a, z, sums);
    if (to.gate) add_products<T>(H, share, z, sums + gate);
    for (int64_t j = 0; summing && j < H; ++j) {
      add_line<T>(a + j * kWide, sums[value_bias + j]);
      add_line<T>(share + j * kWide, sums[gate_bias + j]);
    }
    if (!to.y && !to.u && !to.D) return;
    multiply<T>(H, data_of<T>(call.value), 1, H, a, g, [](int64_t, int) { return Vector<T>{}; });
    multiply<T>(H, data_of<T>(call.gate), 1, H, share, g, [&](int64_t i, int w) { return g[i * kWide + w]; });
    mixing.times(mixing.slope, g);
    if (to.y) rows.write(to.y, g);
    if (to.D) {
      mixing.times(g, u);
      rows.clear_rest(u);
      for (int64_t j = 0; j < H; ++j) add_line<T>(u + j * kWide, sums[feedthrough + j]);
    }
    if (!to.u) return;
    const T* D = data_of<T>(call.D);
    for (int64_t j = 0; j < H; ++j)
      for (int w = 0; w < kWide; ++w) g[j * kWide + w] *= D[j];
    rows.write(to.u, g);
  };
  const auto totals = for_tiles<T>(call.y, Mixing<T>::tiles + 1, summing ? feedthrough + H : 0, work, threads, step);
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
