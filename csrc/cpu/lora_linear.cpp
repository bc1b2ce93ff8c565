#include "kdkernels/lora_linear.h"

#include "low_rank.h"
#include "rows.h"

namespace kd::KD_ISA {
namespace {

constexpr int64_t kChunk = 256;   // rows of an activation that stay in cache while they are used twice
constexpr int64_t kBlock = 1024;  // rows of an output that is converted after it was computed

template <class T>
Activation<T> dropped_input(const LoraLinear& call, const LoraLayer& layer) {
  return {call.input, Dropout(layer.dropout_p, layer.seed, layer.offset)};
}

// Rows of a matrix computed in T: in the output itself where it stores T, else in a block that is converted.
template <class T>
class OutputRows {
 public:
  OutputRows(const View& out, int64_t block) : out_(out), direct_(out.dtype == kDType<T> && out.col_stride == 1) {
    if (!direct_) room_ = Buffer<T>(block * out.cols);
  }
  bool direct() const { return direct_; }
  T* at(int64_t row) { return direct_ ? static_cast<T*>(out_.data) + row * out_.row_stride : room_.get(); }
  int64_t stride() const { return direct_ ? out_.row_stride : out_.cols; }
  // Take what the rows hold now, or put what was computed.
  void load_rows(int threads, int64_t begin, int64_t count) {
    if (direct_) return;
    parallel_chunks(threads, count, kRowGrain, [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) Activation<T>{out_}.read(begin + i, 0, out_.cols, room_.get() + i * out_.cols);
    });
  }
  void store_rows(int threads, int64_t begin, int64_t count) {
    if (direct_) return;
    parallel_chunks(threads, count, kRowGrain, [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) write_row(out_, begin + i, room_.get() + i * out_.cols);
    });
  }

 private:
  View out_;
  bool direct_;

  Buffer<T> room_;
};

template <class T>
Operand<T> rows_from(const View& view, int64_t row) {
  Operand<T> x = operand<T>(view);
  x.data = static_cast<const char*>(view.data) + row * view.row_stride * size_of(view.dtype);
  return x;
}

bool same_matrix(const View& a, const View& b) {
  return a.data == b.data && a.dtype == b.dtype && a.rows == b.rows && a.row_stride == b.row_stride &&
         a.col_stride == b.col_stride;
}

// The first layer that has this one's base, itself if none before it has.
template <class F>
int64_t leader(const LoraLinear& call, int64_t k, F&& same) {
  int64_t first = 0;
  while (!same(call.layers[first], call.layers[k])) ++first;
  return first;
}

// α S Bᵀ from a row on, as a term of the layer's product; `scaling` holds α for each k.
template <class T>
Term<T> low_rank(const LoraLayer& layer, int64_t row, Buffer<T>& scaling) {
  const int64_t r = layer.lora_A.rows;
  scaling = Buffer<T>(r);
  for (int64_t k = 0; k < r; ++k) scaling[k] = static_cast<T>(layer.scaling);
  Operand<T> B = operand<T>(layer.lora_B).transposed();
  B.scale = scaling.get();
  return {operand(static_cast<const T*>(layer.projected.data) + row * r, r), B, r};
}

// ---- forward ------------------------------------------------------------------------------------------------------

// S of every layer, from one pass over x.
template <class T>
void project_all(const LoraLinear& call, int threads) {
  const int64_t N = call.input.rows, d = call.input.cols;
  const List<Panel<T>> panels(call.count);
  int64_t ranks = 0;
  for (int64_t k = 0; k < call.count; ++k) {
    const View& A = call.layers[k].lora_A;
    panels[k] = Panel<T>(threads, operand<T>(A), A.rows, d);
    ranks += A.rows;
  }
  threads = useful_threads(threads, N * d * ranks);
  Buffer<T> rooms(threads * Tile<T>::rows * d);
  constexpr int64_t grain = 4 * Tile<T>::rows;
  parallel_for(threads, ceil_div(N, grain), [&](int64_t task, int worker) {
    for (int64_t k = 0; k < call.count; ++k) {
      const LoraLayer& layer = call.layers[k];
      project(dropped_input<T>(call, layer), task * grain, min(N, (task + 1) * grain), panels[k], T(1),
              static_cast<T*>(layer.projected.data), layer.lora_A.rows, rooms.get() + worker * Tile<T>::rows * d);
    }
  });
}

// Y of a layer that shares its base with none: one product.
template <class T>
void finish_alone(const LoraLinear& call, const LoraLayer& layer, const T* bias, int threads) {
  const int64_t N = call.input.rows;
  OutputRows<T> out(layer.output, min(N, kBlock));
  const int64_t block = out.direct() ? N : kBlock;
  Buffer<T> scaling;
  for (int64_t row = 0; row < N; row += block) {
    const int64_t n = min(block, N - row);
    const Term<T> terms[] = {low_rank(layer, row, scaling),
                             {rows_from<T>(call.input, row), operand<T>(layer.weight).transposed(), call.input.cols}};
    gemm(threads, n, layer.weight.rows, terms, 2, out.at(row), out.stride(), false, bias);
    out.store_rows(threads, row, n);
  }
}

// Y of all layers with the base of the first: its product is computed once, chunk by chunk of rows.
template <class T, class F>
void finish_together(const LoraLinear& call, int64_t first, F&& same, const T* bias, int threads) {
  const LoraLayer& layer = call.layers[first];
  const int64_t N = call.input.rows, d_out = layer.weight.rows;
  Buffer<T> base(min(N, kChunk) * d_out), scaling;
  for (int64_t row = 0; row < N; row += kChunk) {
    const int64_t n = min(kChunk, N - row);
    const Term<T> product{rows_from<T>(call.input, row), operand<T>(layer.weight).transposed(), call.input.cols};
    gemm(threads, n, d_out, &product, 1, base.get(), d_out, false, bias);
    for (int64_t k = first; k < call.count; ++k) {
      const LoraLayer& member = call.layers[k];
      if (!same(layer, member)) continue;
      OutputRows<T> out(member.output, n);
      T* to = out.at(row);
      parallel_chunks(threads, n, kRowGrain, [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < i1; ++i)
          for (int64_t j = 0; j < d_out; ++j) to[i * out.stride() + j] = base[i * d_out + j];
      });
      const Term<T> own = low_rank(member, row, scaling);
      gemm(threads, n, d_out, &own, 1, to, out.stride(), true);
      out.store_rows(threads, row, n);
    }
  }
}

template <class T>
void forward(const LoraLinear& call, int threads) {
  project_all<T>(call, threads);
  auto same = [](const LoraLayer& a, const LoraLayer& b) {
    return same_matrix(a.weight, b.weight) && same_matrix(a.bias, b.bias);
  };
  for (int64_t k = 0; k < call.count; ++k) {
    const LoraLayer& layer = call.layers[k];
    if (!layer.output || leader(call, k, same) < k) continue;
    bool alone = true;
    for (int64_t other = k + 1; other < call.count; ++other) alone = alone && !same(layer, call.layers[other]);
    Buffer<T> bias;
    if (layer.bias) bias = Buffer<T>(layer.weight.rows);
    for (int64_t j = 0; layer.bias && j < layer.weight.rows; ++j) Activation<T>{layer.bias}.read(j, 0, 1, &bias[j]);
    alone ? finish_alone<T>(call, layer, bias.get(), threads) : finish_together<T>(call, k, same, bias.get(), threads);
  }
}

// ---- backward -----------------------------------------------------------------------------------------------------

// dS = α dY B (N, r) where there is room for it, dB = α dYᵀ S and db = Σ dY, chunk by chunk of rows: dY is read once.
template <class T>
void differentiate_up(const LoraLayer& layer, T* dS, int threads) {
  const int64_t N = layer.grad_output.rows, d_out = layer.grad_output.cols, r = layer.lora_A.rows;
  const bool sums = layer.grad_B || layer.grad_bias;
  const Activation<T> dY{layer.grad_output};
  const T scale = static_cast<T>(layer.scaling);
  Panel<T> panel;
  if (dS) panel = Panel<T>(threads, operand<T>(layer.lora_B).transposed(), r, d_out);
  OuterSum<T> sum;
  if (sums) sum = OuterSum<T>(r, d_out, bool(layer.grad_bias));
  const int useful = useful_threads(threads, min(N, kChunk) * d_out * r);
  Buffer<T> rooms(dS ? useful * Tile<T>::rows * d_out : 0);
  for (int64_t begin = 0; begin < N; begin += kChunk) {
    const int64_t end = min(N, begin + kChunk);
    constexpr int64_t grain = 4 * Tile<T>::rows;
    if (dS)
      parallel_for(useful, ceil_div(end - begin, grain), [&](int64_t task, int worker) {
        const int64_t i = begin + task * grain;
        project(dY, i, min(end, i + grain), panel, scale, dS, r, rooms.get() + worker * Tile<T>::rows * d_out);
      });
    if (sums) sum.add(threads, dY, begin, end, static_cast<const T*>(layer.projected.data), scale);
  }
  if (layer.grad_B) sum.write(layer.grad_B, true);
  if (layer.grad_bias) sum.write_total(layer.grad_bias);
}

// Rows [begin, begin + n) of to (·, d_in) [+]= Σ_k mask ⊙ (dS_k A_k) / (1 − p_k).
template <class T>
void add_dropped(const LoraLinear& call, const List<Buffer<T>>& dS, const List<Panel<T>>& A, int64_t begin, int64_t n,
                 T* to, int64_t stride, bool accumulate, int threads) {
  constexpr int64_t rows = Tile<T>::rows, cols = Tile<T>::cols;
  const int64_t d = call.input.cols, width = round_up(d, cols);
  threads = useful_threads(threads, n * d * 16);
  Buffer<T> rooms(threads * (rows + 1) * width);
  parallel_for(threads, ceil_div(n, rows), [&](int64_t task, int worker) {
    const int64_t i = task * rows;
    T* room = rooms.get() + worker * (rows + 1) * width;
    for (int64_t k = 0; k < call.count; ++k) {
      const LoraLayer& layer = call.layers[k];
      const Dropout dropout(layer.dropout_p, layer.seed, layer.offset);
      const int64_t r = layer.lora_A.rows;
      for (int64_t s = 0; s < A[k].strips; ++s)  // dS has a tile's rows of zeros behind its last
        multiply_tile(r, dS[k].get() + (begin + i) * r, r, Fixed<1>{}, A[k].strip(s), Fixed<cols>{}, room + s * cols,
                      width, false);
      for (int64_t q = 0; q < min(rows, n - i); ++q) {
        T *row = room + q * width, *out = to + (i + q) * stride;
        const bool adds = accumulate || k > 0;
        if (dropout) {
          T* dropped = adds ? room + rows * width : out;
          dropout.apply(begin + i + q, 0, d, row, dropped);
          row = dropped;
        }
        for (int64_t j = 0; adds && j < d; ++j) out[j] += row[j];
        for (int64_t j = 0; !adds && !dropout && j < d; ++j) out[j] = row[j];
      }
    }
  });
}

// Σ dY, rows [begin, begin + n), of all layers with the weight of layer `first`; absent if it is alone.
template <class T, class F>
Buffer<T> shared_gradient(const LoraLinear& call, int64_t first, F&& same, int64_t begin, int64_t n, int threads) {
  Buffer<T> sum, lines;
  const LoraLayer& layer = call.layers[first];
  const int64_t d_out = layer.weight.rows;
  for (int64_t k = first + 1; k < call.count; ++k) {
    if (!same(layer, call.layers[k])) continue;
    const bool started = sum.get();
    if (!started) sum = Buffer<T>(n * d_out), lines = Buffer<T>(threads * d_out);
    parallel_for(threads, ceil_div(n, kRowGrain), [&](int64_t chunk, int worker) {
      T* line = lines.get() + worker * d_out;
      for (int64_t i = chunk * kRowGrain; i < min(n, (chunk + 1) * kRowGrain); ++i) {
        T* to = sum.get() + i * d_out;
        if (!started) Activation<T>{layer.grad_output}.read(begin + i, 0, d_out, to);
        Activation<T>{call.layers[k].grad_output}.read(begin + i, 0, d_out, line);
        for (int64_t j = 0; j < d_out; ++j) to[j] += line[j];
      }
    });
  }
  return sum;
}

// dX = Σ_k dY_k W_k + mask_k ⊙ (dS_k A_k)/(1 − p_k). With `masked` the second part is there already.
template <class T>
void differentiate_input(const LoraLinear& call, const List<Buffer<T>>& dS, bool masked, int threads) {
  const int64_t N = call.input.rows, d_in = call.input.cols, K = call.count;
  auto same = [](const LoraLayer& a, const LoraLayer& b) { return same_matrix(a.weight, b.weight); };
  bool drops = false, shares = false;
  for (int64_t k = 0; k < K; ++k) {
    drops = drops || call.layers[k].dropout_p > 0;
    shares = shares || leader(call, k, same) < k;
  }
  const List<Panel<T>> A(K);
  for (int64_t k = 0; k < K && drops && !masked; ++k)
    A[k] = Panel<T>(threads, operand<T>(call.layers[k].lora_A).transposed(), d_in, call.layers[k].lora_A.rows);
  OutputRows<T> out(call.grad_input, min(N, kBlock));
  const int64_t block = out.direct() && !shares ? N : kBlock;
  const List<Buffer<T>> sums(K);
  const List<Term<T>> terms(2 * K);
  for (int64_t row = 0; row < N; row += block) {
    const int64_t n = min(block, N - row);
    int64_t count = 0;
    for (int64_t k = 0; k < K; ++k) {
      const LoraLayer& layer = call.layers[k];
      const int64_t r = layer.lora_A.rows;
      if (!drops) terms[count++] = {operand<T>(dS[k].get() + row * r, r), operand<T>(layer.lora_A), r};
      if (call.base_done || leader(call, k, same) < k) continue;
      sums[k] = shared_gradient<T>(call, k, same, row, n, threads);
      const Operand<T> dY =
          sums[k].get() ? operand<T>(sums[k].get(), layer.weight.rows) : rows_from<T>(layer.grad_output, row);
      terms[count++] = {dY, operand<T>(layer.weight), layer.weight.rows};
    }
    if (call.base_done) out.load_rows(threads, row, n);
    if (drops && !masked) add_dropped(call, dS, A, row, n, out.at(row), out.stride(), call.base_done, threads);
    if (count) gemm(threads, n, d_in, &terms[0], count, out.at(row), out.stride(), drops || call.base_done);
    out.store_rows(threads, row, n);
  }
}

template <class T>
void backward(const LoraLinear& call, int threads) {
  const int64_t N = call.input.rows, d_in = call.input.cols, K = call.count;
  const List<Buffer<T>> dS(K);
  const List<OuterSum<T>> dA(K);
  for (int64_t k = 0; k < K; ++k) {
    const LoraLayer& layer = call.layers[k];
    const int64_t r = layer.lora_A.rows, padded = (N + Tile<T>::rows) * r;
    if (call.grad_input || layer.grad_A) dS[k] = Buffer<T>(padded);
    for (int64_t i = N * r; dS[k].get() && i < padded; ++i) dS[k][i] = T{};
    differentiate_up<T>(layer, dS[k].get(), threads);
    if (layer.grad_A) dA[k] = OuterSum<T>(r, d_in, false);
    if (layer.grad_weight) {
      Accumulator<T> dW(layer.grad_weight);
      gemm(threads, layer.weight.rows, d_in, N, operand<T>(layer.grad_output).transposed(), operand<T>(call.input),
           dW.data(), d_in, dW.started());
      dW.finish(threads);
    }
  }
  // Where every layer has a mask, and both dA and dX are wanted, each mask is drawn once for the two.
  bool together = call.grad_input && call.grad_input.dtype == kDType<T> && call.grad_input.col_stride == 1;
  for (int64_t k = 0; k < K; ++k) together = together && dA[k] && call.layers[k].dropout_p > 0;
  const List<Panel<T>> A(K);
  for (int64_t k = 0; k < K && together; ++k)
    A[k] = Panel<T>(threads, operand<T>(call.layers[k].lora_A).transposed(), d_in, call.layers[k].lora_A.rows);
  for (int64_t begin = 0; begin < N; begin += kChunk)  // chunk by chunk: x is read once for all layers
    for (int64_t k = 0; k < K; ++k) {
      if (!dA[k]) continue;
      const View& dX = call.grad_input;
      const MaskedProduct<T> part{static_cast<T*>(dX.data), dX.row_stride, call.base_done || k > 0, &A[k],
                                  call.layers[k].lora_A.rows};
      dA[k].add(threads, dropped_input<T>(call, call.layers[k]), begin, min(N, begin + kChunk), dS[k].get(), T(1),
                together ? &part : nullptr);
    }
  for (int64_t k = 0; k < K; ++k)
    if (dA[k]) dA[k].write(call.layers[k].grad_A, false);
  if (call.grad_input) differentiate_input(call, dS, together, threads);
}

}  // namespace

extern const LoraLinearKernels lora_linear;
const LoraLinearKernels lora_linear = {
    [](const LoraLinear& call, int threads) {
      call.accumulate == DType::float64 ? forward<double>(call, threads) : forward<float>(call, threads);
    },
    [](const LoraLinear& call, int threads) {
      call.accumulate == DType::float64 ? backward<double>(call, threads) : backward<float>(call, threads);
    },
};

}  // namespace kd::KD_ISA
