// Matrix products C (M, N) [+]= Σ A (M, K) · B (K, N), operands of any strides and dtype, accumulated in T.
//
// Blocks of A and B are packed into the order the register tile reads them (Goto and van de Geijn 2008). Every
// element of C sums its k in one fixed order, whichever thread computes it: results are the same bits for every
// thread count. A band says which part of B or C is structurally zero or not wanted, and that part costs nothing.
#pragma once

#include "simd.h"

namespace kd::KD_ISA {

// An operand's element (i, k) is scale[k] · data[i·row_stride + k·col_stride]; no scale means 1.
template <class T>
struct Operand {
  const void* data;
  DType dtype;
  int64_t row_stride, col_stride;
  const T* scale = nullptr;

  Operand transposed() const { return {data, dtype, col_stride, row_stride, scale}; }
};

template <class T>
Operand<T> operand(const T* data, int64_t row_stride, int64_t col_stride = 1) {
  return {data, kDType<T>, row_stride, col_stride};
}
template <class T>
Operand<T> operand(const View& view) {
  return {view.data, view.dtype, view.row_stride, view.col_stride};
}

struct Band {
  enum Kind { full, lower, upper, symmetric } kind = full;
  int64_t offset = 0;
  // lower: B[k, j] is zero for k < j − offset.   upper: B[k, j] is zero for k > j + offset.
  // symmetric: only C[i, j] with i <= j is wanted; the caller mirrors it.
};

template <class T>
struct Tile {
  static constexpr int rows = kVectorBytes == 64 ? 14 : 6;  // with two columns of vectors this fills the registers
  static constexpr int cols = 2 * kLanes<T>;
  static constexpr int64_t depth = kVectorBytes == 64 ? 384 : 512;  // long enough that C is seldom read and written
  static constexpr int64_t panel_rows = rows * (kVectorBytes == 64 ? 14 : 28);
  static constexpr int64_t panel_cols = 128 * cols;
};

// A stride that the compiler knows.
template <int64_t n>
struct Fixed {
  constexpr operator int64_t() const { return n; }
};

// A tile: C (rows, columns) [+]= aᵀ · b (+ bias, a row, where it starts), with a[i, k] at a[i·a_row + k·a_k] and b's
// rows b_k apart, of one vector of columns or two.
template <int rows, int vectors, class T, class ARow, class AK, class BK>
inline void multiply_block(int64_t depth, const T* a, ARow a_row, AK a_k, const T* b, BK b_k, T* c, int64_t ldc,
                           bool accumulate, const T* bias = nullptr) {
  using V = Vector<T>;
  using U = UnalignedVector<T>;
  constexpr int lanes = kLanes<T>;
  V sum[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      sum[i][v] = V{};
      __builtin_prefetch(c + i * ldc + v * lanes, 1);  // C arrives while the products run
    }
  for (int64_t k = 0; k < depth; ++k) {
    const auto* row = reinterpret_cast<const U*>(b);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const V ai = a[i * a_row] - V{};  // broadcast
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[i][v] += ai * row[v];
    }
    a += a_k;
    b += b_k;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    auto* p = reinterpret_cast<U*>(c + i * ldc);
    const auto* start = accumulate ? p : reinterpret_cast<const U*>(bias);
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) p[v] = start ? sum[i][v] + start[v] : sum[i][v];
  }
}

// The tile of products, which fills the registers.
template <class T, class ARow, class AK, class BK>
inline void multiply_tile(int64_t depth, const T* a, ARow a_row, AK a_k, const T* b, BK b_k, T* c, int64_t ldc,
                          bool accumulate, const T* bias = nullptr) {
  multiply_block<Tile<T>::rows, 2>(depth, a, a_row, a_k, b, b_k, c, ldc, accumulate, bias);
}

template <class T>
inline void multiply_packed(int64_t depth, const T* a, const T* b, T* c, int64_t ldc, bool accumulate, const T* bias) {
  multiply_tile(depth, a, Fixed<1>{}, Fixed<Tile<T>::rows>{}, b, Fixed<Tile<T>::cols>{}, c, ldc, accumulate, bias);
}

// Transpose a square of vectors in place.
template <class T>
inline void transpose(Vector<T> (&v)[kLanes<T>]) {
  constexpr int lanes = kLanes<T>;
  using Index = typename IndexOf<T>::type;
#pragma GCC unroll 4
  for (int half = lanes / 2; half > 0; half /= 2) {  // exchange off-diagonal blocks of `half` lanes
    Index low, high;
    for (int l = 0; l < lanes; ++l) {
      const int other = l & half;
      low[l] = other ? lanes + l - half : l;
      high[l] = other ? lanes + l : l + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      if (!(i & half)) {
        const Vector<T> a = v[i], b = v[i + half];
        v[i] = __builtin_shuffle(a, b, low);
        v[i + half] = __builtin_shuffle(a, b, high);
      }
  }
}

// A strip is `width` lines of an operand, `depth` long, packed so that line i's element k lands at out[k·width + i].

// `strips` whole strips of lines that lie beside each other: whole cache lines of the operand are read at a time.
template <int strips, int width, class T, class S>
inline void pack_adjacent(const S* data, int64_t k_stride, int64_t depth, const T* scale, T* out, int64_t distance) {
  for (int64_t k = 0; k < depth; ++k, data += k_stride) {
    const T factor = scale ? scale[k] : T(1);
#pragma GCC unroll 4
    for (int s = 0; s < strips; ++s)
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) out[s * distance + k * width + i] = factor * load<T>(data + s * width + i);
  }
}

// One strip whose lines are contiguous: squares of vectors are transposed. Returns how many k are done.
template <int width, class T, class S>
inline int64_t pack_contiguous(const S* data, int64_t line_stride, int64_t depth, const T* scale, T* out) {
  constexpr int lanes = kLanes<T>, groups = (width + lanes - 1) / lanes;
  int64_t k = 0;
  // A store may write past its k, which the next one mends: so the last k is left, unless lines fill the vectors.
  for (; k + lanes + (width % lanes != 0) <= depth; k += lanes) {
    Vector<T> squares[groups][lanes];
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        const int line = g * lanes + i < width ? g * lanes + i : width - 1;  // repeated lines are overwritten
        squares[g][i] = load_vector<T>(data + line * line_stride + k);
      }
      transpose<T>(squares[g]);
    }
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) {  // in the order of k: what a store writes too much the next one mends
      const T factor = scale ? scale[k + l] : T(1);
#pragma GCC unroll 8
      for (int g = 0; g < groups; ++g)
        *reinterpret_cast<UnalignedVector<T>*>(out + (k + l) * width + g * lanes) = factor * squares[g][l];
    }
  }
  return k;
}

// Strip after strip, `distance` apart: lines [line, end) of an operand whose lines are its rows, and k in
// [k0, k0 + depth). Lines from `lines` on are zero.
template <int width, class T>
inline void pack(const Operand<T>& x, int64_t line, int64_t end, int64_t lines, int64_t k0, int64_t depth, T* out,
                 int64_t distance) {
  constexpr int together = 4;
  const T* scale = x.scale ? x.scale + k0 : nullptr;
  with_type(x.dtype, [&]<class S>(S*) {
    const S* data = static_cast<const S*>(x.data) + k0 * x.col_stride;
    for (int strips = 1; line < end; line += strips * width, out += strips * distance) {
      const S* from = data + line * x.row_stride;
      const int64_t valid = min<int64_t>(width, lines - line);
      strips = 1;
      int64_t k = 0;
      if (x.row_stride == 1 && line + together * width <= min(end, lines)) {
        strips = together;
        pack_adjacent<together, width>(from, x.col_stride, k = depth, scale, out, distance);
      } else if (x.row_stride == 1 && valid == width) {
        pack_adjacent<1, width>(from, x.col_stride, k = depth, scale, out, distance);
      } else if (x.col_stride == 1 && valid == width) {
        k = pack_contiguous<width>(from, x.row_stride, depth, scale, out);
      }
      for (; k < depth; ++k) {
        const T factor = scale ? scale[k] : T(1);
        for (int64_t i = 0; i < width; ++i)
          out[k * width + i] = i < valid ? factor * load<T>(from + i * x.row_stride + k * x.col_stride) : T{};
      }
    }
  });
}

// One product of a sum: A (M, K) · B (K, N).
template <class T>
struct Term {
  Operand<T> A, B;
  int64_t K;
};

// f(term, its k, depth, place) for each piece of a term within [k0, k0 + depth) of the terms' joined k.
template <class T, class F>
inline void each_piece(const Term<T>* terms, int64_t k0, int64_t depth, F&& f) {
  int64_t start = 0;
  for (const Term<T>* term = terms; start < k0 + depth; start += term++->K) {
    const int64_t begin = max(start, k0), end = min(start + term->K, k0 + depth);
    if (begin < end) f(*term, begin - start, end - begin, begin - k0);
  }
}

// C (M, N) [+]= Σ A_t B_t (+ bias, a contiguous row): as one product of the terms' joined k, which writes C no more
// often than its longest term would. A band is for a single term.
template <class T>
void gemm(int threads, int64_t M, int64_t N, const Term<T>* terms, int64_t count, T* C, int64_t ldc,
          bool accumulate = false, const T* bias = nullptr, Band band = {}) {
  constexpr int64_t rows = Tile<T>::rows, cols = Tile<T>::cols;
  if (M == 0 || N == 0) return;
  int64_t K = 0;
  for (int64_t t = 0; t < count; ++t) K += terms[t].K;
  if (K == 0) {
    if (!accumulate)
      for (int64_t i = 0; i < M; ++i)
        for (int64_t j = 0; j < N; ++j) C[i * ldc + j] = bias ? bias[j] : T{};
    return;
  }
  threads = useful_threads(threads, M * N * K);
  // Panels of A are made a little smaller where that gives every thread the same number of them.
  const int64_t rounds = ceil_div(M, threads * Tile<T>::panel_rows);
  const int64_t panel_rows = round_up(ceil_div(M, threads * rounds), rows);
  // Equal blocks of k. A little longer is better than one more: a narrow term should not cost a pass over C.
  const int64_t depth = ceil_div(K, ceil_div(K, Tile<T>::depth + Tile<T>::depth / 8));
  const int64_t panel_cols = min(Tile<T>::panel_cols, round_up(N, cols));
  const int64_t row_panels = ceil_div(M, panel_rows);
  const int64_t col_parts = max<int64_t>(1, min(threads / row_panels, ceil_div(panel_cols, 4 * cols)));
  const int64_t room_a = panel_rows * depth;
  Buffer<T> packed_b(panel_cols * depth), packed_a(threads * room_a);

  for (int64_t j0 = 0; j0 < N; j0 += panel_cols) {
    const int64_t n = min(panel_cols, N - j0), strips = ceil_div(n, cols);
    for (int64_t k0 = 0; k0 < K; k0 += depth) {
      const int64_t kc = min(depth, K - k0);
      auto first = [&](int64_t j) {  // of the k with B[k, j..j+cols) not zero, counted from k0
        return band.kind == Band::lower ? min(max<int64_t>(j - band.offset - k0, 0), kc) : 0;
      };
      auto last = [&](int64_t j) {
        return band.kind == Band::upper ? min(max<int64_t>(j + cols + band.offset - k0, 0), kc) : kc;
      };
      auto starts = [&](int64_t j) {  // whether this is the first block of k that reaches strip j
        return band.kind == Band::lower ? k0 <= max<int64_t>(j - band.offset, 0) : k0 == 0;
      };
      parallel_chunks(threads, strips, 8, [&](int64_t begin, int64_t end) {
        auto empty = [&](int64_t s) { return first(j0 + s * cols) >= last(j0 + s * cols); };
        while (begin < end && empty(begin)) ++begin;
        while (begin < end && empty(end - 1)) --end;
        each_piece(terms, k0, kc, [&](const Term<T>& term, int64_t k, int64_t length, int64_t place) {
          pack<cols>(term.B.transposed(), j0 + begin * cols, j0 + end * cols, N, k, length,
                     packed_b.get() + (begin * kc + place) * cols, kc * cols);
        });
      });
      parallel_for(threads, row_panels * col_parts, [&](int64_t task, int worker) {
        const int64_t i0 = task / col_parts * panel_rows, i1 = min(M, i0 + panel_rows);
        const int64_t part = ceil_div(strips, col_parts), s0 = task % col_parts * part, s1 = min(strips, s0 + part);
        if (band.kind == Band::symmetric && i0 >= j0 + min(s1 * cols, n)) return;
        T* a = packed_a.get() + worker * room_a;
        each_piece(terms, k0, kc, [&](const Term<T>& term, int64_t k, int64_t length, int64_t place) {
          pack<rows>(term.A, i0, i1, i1, k, length, a + place * rows, kc * rows);
        });
        for (int64_t s = s0; s < s1; ++s) {
          const int64_t j = j0 + s * cols, kb = first(j), ke = last(j);
          if (kb >= ke) continue;
          const bool add = accumulate || !starts(j);
          const T* b = packed_b.get() + s * cols * kc + kb * cols;
          for (int64_t i = i0; i < i1; i += rows) {
            if (band.kind == Band::symmetric && i >= j + cols) break;
            const T* ai = a + (i - i0) * kc + kb * rows;
            T* c = C + i * ldc + j;
            if (i + rows <= i1 && j + cols <= N) {
              multiply_packed(ke - kb, ai, b, c, ldc, add, bias ? bias + j : nullptr);
            } else {  // an edge: through a full tile of its own
              alignas(64) T edge[rows * cols];
              multiply_packed<T>(ke - kb, ai, b, edge, cols, false, nullptr);
              for (int64_t r = 0; r < min(rows, i1 - i); ++r)
                for (int64_t q = 0; q < min(cols, N - j); ++q)
                  c[r * ldc + q] = edge[r * cols + q] + (add ? c[r * ldc + q] : bias ? bias[j + q] : T{});
            }
          }
        }
      });
    }
  }
}

template <class T>
void gemm(int threads, int64_t M, int64_t N, int64_t K, Operand<T> A, Operand<T> B, T* C, int64_t ldc,
          bool accumulate = false, Band band = {}) {
  const Term<T> term{A, B, K};
  gemm(threads, M, N, &term, 1, C, ldc, accumulate, static_cast<const T*>(nullptr), band);
}

// Fill the lower triangle of C (N, N) from the upper.
template <class T>
void mirror(int threads, int64_t N, T* C) {
  constexpr int64_t square = 32;
  parallel_chunks(threads, N, square, [&](int64_t begin, int64_t end) {
    for (int64_t j0 = 0; j0 < end; j0 += square)
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = j0; j < min(i, j0 + square); ++j) C[i * N + j] = C[j * N + i];
  });
}

}  // namespace kd::KD_ISA
