// Products of activations with narrow matrices: one pass over the activation, which is dropped out and converted on the
// way, a tile of rows at a time.
#pragma once

#include "dropout.h"
#include "gemm.h"
#include "rows.h"

namespace kd::KD_ISA {

constexpr int64_t kOuterRows = 64;      // rows summed in registers before they are added to what came before
constexpr int64_t kOuterColumns = 128;  // columns a task of a sum over rows
static_assert(kOuterColumns <= Dropout::segment, "a mask's words are drawn by the segment");

// An activation, row by row, after dropout.
template <class T>
struct Activation {
  View view;
  Dropout dropout = {};

  bool in_place() const { return view.dtype == kDType<T> && view.col_stride == 1 && !dropout; }
  const T* at(int64_t row) const { return static_cast<const T*>(view.data) + row * view.row_stride; }

  // Columns [col, col + n) of a row; col is a multiple of 4. The words of the mask are kept where there is room for
  // them: of a segment, at most.
  void read(int64_t row, int64_t col, int64_t n, T* to, uint32_t* words = nullptr) const {
    if (words) dropout.draw(row, col, n, words);
    with_type(view.dtype, [&]<class S>(S*) {
      const S* from = static_cast<const S*>(view.data) + row * view.row_stride + col * view.col_stride;
      if (view.col_stride == 1 && dropout)
        return words ? dropout.choose(words, n, from, to) : dropout.apply(row, col, n, from, to);
      if (view.col_stride == 1)
        for (int64_t j = 0; j < n; ++j) to[j] = load<T>(from + j);
      else
        for (int64_t j = 0; j < n; ++j) to[j] = load<T>(from + j * view.col_stride);
      if (dropout) words ? dropout.choose(words, n, to, to) : dropout.apply(row, col, n, to, to);
    });
  }
};

// r lines of `depth` elements, packed once for all rows that meet them.
template <class T>
struct Panel {
  Panel() = default;
  Panel(int threads, Operand<T> lines, int64_t r, int64_t depth_) : depth(depth_), strips(ceil_div(r, Tile<T>::cols)) {
    constexpr int64_t cols = Tile<T>::cols;
    packed = Buffer<T>(strips * cols * depth);
    parallel_for(useful_threads(threads, r * depth), strips, [&](int64_t s, int) {
      pack<cols>(lines, s * cols, (s + 1) * cols, r, 0, depth, packed.get() + s * cols * depth, cols * depth);
    });
  }
  const T* strip(int64_t s) const { return packed.get() + s * Tile<T>::cols * depth; }

  Buffer<T> packed;
  int64_t depth = 0, strips = 0;
};

// Rows [begin, end) of out (·, r) = scale · x · linesᵀ, by one thread. `room` holds a tile's rows of x.
template <class T>
void project(const Activation<T>& x, int64_t begin, int64_t end, const Panel<T>& panel, T scale, T* out, int64_t r,
             T* room) {
  constexpr int64_t rows = Tile<T>::rows, cols = Tile<T>::cols;
  const int64_t d = panel.depth;
  for (int64_t i = begin; i < end; i += rows) {
    const int64_t valid = min(rows, end - i);
    const bool direct = x.in_place() && valid == rows;
    for (int64_t q = 0; q < rows && !direct; ++q) {
      if (q < valid)
        x.read(i + q, 0, d, room + q * d);
      else
        for (int64_t j = 0; j < d; ++j) room[q * d + j] = T{};
    }
    const T* a = direct ? x.at(i) : room;
    const int64_t stride = direct ? x.view.row_stride : d;
    for (int64_t s = 0; s < panel.strips; ++s) {
      alignas(64) T sums[rows * cols] = {};
      const bool narrow = r - s * cols <= kLanes<T>;  // half a tile's columns are enough
      for (int64_t k = 0; k < d; k += Tile<T>::depth) {
        const int64_t depth = min(Tile<T>::depth, d - k);
        const T* lines = panel.strip(s) + k * cols;
        if (narrow)
          multiply_block<rows, 1>(depth, a + k, stride, Fixed<1>{}, lines, Fixed<cols>{}, sums, cols, true);
        else
          multiply_block<rows, 2>(depth, a + k, stride, Fixed<1>{}, lines, Fixed<cols>{}, sums, cols, true);
      }
      for (int64_t q = 0; q < valid; ++q)
        for (int64_t c = 0; c < min(cols, r - s * cols); ++c)
          out[(i + q) * r + s * cols + c] = scale * sums[q * cols + c];
    }
  }
}

// What a mask lets through of a product besides: to (·, d) [+]= mask ⊙ (l m) / (1 − p), of narrow rows l (·, r), which
// have a tile's rows behind their last, and m (r, d), packed.
template <class T>
struct MaskedProduct {
  T* to;
  int64_t stride;
  bool accumulate;
  const Panel<T>* m;
  int64_t r;
};

// Σ over rows of lᵀ x, (r, d), of narrow rows l (·, r) and wide rows x; and, where wanted, of the wide rows alone.
// Each element sums its rows in order, whatever the threads.
template <class T>
class OuterSum {
  // Ranks are multiples of 8 as a rule, which a tile of 14 rows would pad to 28.
  static constexpr int kRows = kVectorBytes == 64 ? 16 : Tile<T>::rows, kVectors = kVectorBytes == 64 ? 1 : 2;

 public:
  OuterSum() = default;
  OuterSum(int64_t r, int64_t d, bool total)
      : r_(r),
        d_(d),
        padded_(round_up(r + total, kRows)),
        stride_(round_up(d, Tile<T>::cols)),
        sums_(padded_ * stride_) {}
  explicit operator bool() const { return sums_.get(); }

  // `besides` is for the mask of x, whose words are then drawn once for both.
  void add(int threads, const Activation<T>& x, int64_t begin, int64_t end, const T* narrow, T scale,
           const MaskedProduct<T>* besides = nullptr) {
    constexpr int64_t cols = kVectors * kLanes<T>, lines = kOuterRows * kOuterColumns;
    threads = useful_threads(threads, (end - begin) * d_ * r_);
    const int64_t products = besides ? round_up(kOuterRows, Tile<T>::rows) * kOuterColumns : 0;
    const int64_t room_size = lines + kOuterRows * padded_ + products;
    Buffer<T> rooms(threads * room_size);
    Buffer<uint32_t> drawn(besides ? threads * lines : 0);
    parallel_for(threads, ceil_div(d_, kOuterColumns), [&](int64_t task, int worker) {
      const int64_t j0 = task * kOuterColumns, j1 = min(d_, j0 + kOuterColumns);
      T* room = rooms.get() + worker * room_size;
      uint32_t* words = drawn.get() + worker * lines;
      T* left = room + lines;  // (rows of a chunk, padded_)
      for (int64_t i = begin; i < end; i += kOuterRows) {
        const int64_t n = min(kOuterRows, end - i);
        for (int64_t q = 0; q < n; ++q) {
          for (int64_t k = 0; k < padded_; ++k)
            left[q * padded_ + k] = k < r_ ? scale * narrow[(i + q) * r_ + k] : k == r_ ? T(1) : T{};
          if (besides)
            x.read(i + q, j0, j1 - j0, room + q * kOuterColumns, words + q * kOuterColumns);
          else if (!x.in_place())
            x.read(i + q, j0, j1 - j0, room + q * kOuterColumns);
        }
        if (besides) multiply_besides(*besides, x.dropout, narrow, i, n, j0, j1, words, left + kOuterRows * padded_);
        for (int64_t j = j0; j < j1; j += cols) {
          const T* right = x.in_place() ? x.at(i) + j : room + (j - j0);
          int64_t stride = x.in_place() ? x.view.row_stride : kOuterColumns;
          if (x.in_place() && j + cols > d_) {  // the last columns, where a row ends within the tile
            for (int64_t q = 0; q < n; ++q) x.read(i + q, j, d_ - j, room + q * cols);
            right = room;
            stride = cols;
          }
          for (int64_t k = 0; k < padded_; k += kRows)
            multiply_block<kRows, kVectors>(n, left + k, Fixed<1>{}, padded_, right, stride,
                                            sums_.get() + k * stride_ + j, stride_, started_ || i > begin);
        }
      }
    });
    started_ = started_ || end > begin;
  }

  // The sum to `out` (r, d), or (d, r) if transposed.
  void write(const View& out, bool transposed) const {
    if (!transposed) {
      for (int64_t k = 0; k < r_; ++k) write_row<T>(out, k, started_ ? sums_.get() + k * stride_ : nullptr);
      return;
    }
    Buffer<T> line(r_);
    for (int64_t j = 0; j < d_; ++j) {
      for (int64_t k = 0; k < r_; ++k) line[k] = started_ ? sums_[k * stride_ + j] : T{};
      write_row(out, j, line.get());
    }
  }
  // The sum of the wide rows to `out` (d, 1).
  void write_total(const View& out) const {
    for (int64_t j = 0; j < d_; ++j) {
      const T total = started_ ? sums_[r_ * stride_ + j] : T{};
      write_row(out, j, &total);
    }
  }

 private:
  // Rows [i, i + n) and columns [j0, j1) of the product besides.
  static void multiply_besides(const MaskedProduct<T>& product, const Dropout& dropout, const T* narrow, int64_t i,
                               int64_t n, int64_t j0, int64_t j1, const uint32_t* words, T* room) {
    constexpr int64_t rows = Tile<T>::rows, cols = Tile<T>::cols;
    for (int64_t q = 0; q < n; q += rows)
      for (int64_t j = j0; j < j1; j += cols)
        multiply_tile(product.r, narrow + (i + q) * product.r, product.r, Fixed<1>{}, product.m->strip(j / cols),
                      Fixed<cols>{}, room + q * kOuterColumns + (j - j0), kOuterColumns, false);
    for (int64_t q = 0; q < n; ++q) {
      T* to = product.to + (i + q) * product.stride + j0;
      const uint32_t* own = words + q * kOuterColumns;
      if (product.accumulate)
        dropout.template choose<true>(own, j1 - j0, room + q * kOuterColumns, to);
      else
        dropout.choose(own, j1 - j0, room + q * kOuterColumns, to);
    }
  }

  int64_t r_ = 0, d_ = 0, padded_ = 0, stride_ = 0;
  Buffer<T> sums_;
  bool started_ = false;
};

}  // namespace kd::KD_ISA
