// C (M, N) [+]= A (M, K) · B (K, N) from bfloat16 numbers, by a tile of `bf16_tile.h`; sums are float32.
//
// Operands of float32 are rounded to bfloat16, once, or to a sum of two: 16 bits. As in gemm.h every element of C sums
// its k in one fixed order: the same bits for any number of threads.
#pragma once

#include "../common/bf16_tile.h"
#include "gemm.h"

namespace kd::KD_ISA {

#if defined(__AVX512F__)

typedef uint32_t Words __attribute__((vector_size(64)));

// Numbers of one line at an even k and the one after it, as the tiles want them: the first in the low half.
inline Words joined(Words even, Words odd) {
  return (even >> 16) | (odd & 0xffff0000u);
}

// Round to nearest, ties to even; NaN stays NaN. The result is in the upper halves, whose lower ones are not cleared.
inline Words rounded(Vector<float> x) {
  const Words bits = reinterpret_cast<Words>(x);
  const Words near = bits + 0x7fffu + ((bits >> 16) & 1u);
  const auto nan = reinterpret_cast<Words>(x != x);
  return (nan & (bits | 0x400000u)) | (~nan & near);
}

// x and, of two terms, what the first leaves of it.
inline Words term_of(Vector<float> x, int term) {
  Words bits = rounded(x);
  if (term == 0) return bits;
  const auto first = reinterpret_cast<Vector<float>>(bits & 0xffff0000u);
  const Vector<float> rest = x - first;
  return rounded(rest == rest ? rest : Vector<float>{});  // of what is not finite the first term holds all
}

// 16 lines by 32 k of an operand whose lines are its rows, as one term, into a tile: line after line, or of B
// (`by_pairs`) pair after pair. Lines from `lines` on and k from `depth` on are 0.
template <class S>
inline void pack_tile(const S* data, int64_t line_stride, int64_t k_stride, int64_t lines, int64_t depth, int term,
                      bool by_pairs, uint16_t* out) {
  Vector<float> rows[kBf16Lines];
  auto put = [&](bool transposed) {
    if (transposed) transpose<float>(rows);
    for (int i = 0; i < kBf16Lines; ++i) *reinterpret_cast<UnalignedVector<float>*>(out + i * kBf16Depth) = rows[i];
  };
  const bool whole = lines >= kBf16Lines && depth >= kBf16Depth;
  if (whole && line_stride == 1) {
    for (int64_t pair = 0; pair < kBf16Depth / 2; ++pair) {
      const Vector<float> even = load_vector<float>(data + 2 * pair * k_stride);
      const Vector<float> odd = load_vector<float>(data + (2 * pair + 1) * k_stride);
      rows[pair] = reinterpret_cast<Vector<float>>(joined(term_of(even, term), term_of(odd, term)));
    }
    return put(!by_pairs);
  }
  if (whole && k_stride == 1) {
    constexpr Words evens = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, odds = evens + 1;
    for (int64_t i = 0; i < kBf16Lines; ++i) {
      const Words low = term_of(load_vector<float>(data + i * line_stride), term);
      const Words high = term_of(load_vector<float>(data + i * line_stride + 16), term);
      rows[i] = reinterpret_cast<Vector<float>>(
          joined(__builtin_shuffle(low, high, evens), __builtin_shuffle(low, high, odds)));
    }
    return put(by_pairs);
  }
  for (int64_t i = 0; i < kBf16Lines; ++i)
    for (int64_t k = 0; k < kBf16Depth; ++k) {
      Vector<float> x{};
      if (i < lines && k < depth) x[0] = load<float>(data + i * line_stride + k * k_stride);
      out[by_pairs ? (k / 2) * kBf16Depth + 2 * i + k % 2 : i * kBf16Depth + k] =
          static_cast<uint16_t>(term_of(x, term)[0] >> 16);
    }
}

// Lines [line, end) by k in [k0, k0 + depth), tile after tile of each 16 lines, `distance` numbers apart; the terms of
// a line of tiles follow each other.
inline void pack_tiles(const Operand<float>& x, int64_t line, int64_t end, int64_t lines, int64_t k0, int64_t depth,
                       int terms, bool by_pairs, uint16_t* out, int64_t distance) {
  with_type(x.dtype, [&]<class S>(S*) {
    if constexpr (sizeof(S) < 8)
      for (; line < end; line += kBf16Lines, out += distance) {
        uint16_t* to = out;
        for (int term = 0; term < terms; ++term)
          for (int64_t k = 0; k < depth; k += kBf16Depth, to += kBf16Numbers)
            pack_tile(static_cast<const S*>(x.data) + line * x.row_stride + (k0 + k) * x.col_stride, x.row_stride,
                      x.col_stride, lines - line, depth - k, term, by_pairs, to);
      }
  });
}

inline void gemm_bf16(const Bf16Tile& tile, int threads, int64_t M, int64_t N, int64_t K, const Operand<float>& A,
                      int terms, const Operand<float>& B, float* C, int64_t ldc, bool accumulate) {
  if (M == 0 || N == 0) return;
  if (K == 0) {
    for (int64_t i = 0; i < M && !accumulate; ++i)
      for (int64_t j = 0; j < N; ++j) C[i * ldc + j] = 0;
    return;
  }
  constexpr int64_t square = 2 * kBf16Lines, deepest = 512, most_rows = 8 * square, most_cols = 128 * square;
  threads = useful_threads(threads, M * N * K / 8);
  const int64_t rounds = ceil_div(M, threads * most_rows);
  const int64_t panel_rows = round_up(ceil_div(M, threads * rounds), square);
  const int64_t panel_cols = min(most_cols, round_up(N, square));
  const int64_t row_panels = ceil_div(M, panel_rows);
  const int64_t room_a = panel_rows * deepest * terms;
  Buffer<uint16_t> packed_b(panel_cols * deepest), packed_a(threads * room_a);
  for (int64_t j0 = 0; j0 < N; j0 += panel_cols) {
    const int64_t n = min(panel_cols, N - j0);
    for (int64_t k0 = 0; k0 < K; k0 += deepest) {
      const int64_t depth = min(deepest, K - k0), blocks = ceil_div(depth, kBf16Depth);
      const int64_t distance = blocks * kBf16Numbers;
      const bool add = accumulate || k0 > 0;
      parallel_chunks(threads, ceil_div(n, square), 4, [&](int64_t begin, int64_t end) {
        pack_tiles(B.transposed(), j0 + begin * square, j0 + end * square, N, k0, depth, 1, true,
                   packed_b.get() + begin * 2 * distance, distance);
      });
      parallel_for(threads, row_panels, [&](int64_t panel, int worker) {
        const int64_t i0 = panel * panel_rows, i1 = min(M, i0 + panel_rows);
        uint16_t* a = packed_a.get() + worker * room_a;
        pack_tiles(A, i0, i0 + round_up(i1 - i0, square), M, k0, depth, terms, false, a, terms * distance);
        tile.begin();
        for (int64_t j = 0; j < n; j += square)
          for (int64_t i = i0; i < i1; i += square) {
            const uint16_t* ai = a + (i - i0) / kBf16Lines * terms * distance;
            const uint16_t* bj = packed_b.get() + j / kBf16Lines * distance;
            float* c = C + i * ldc + j0 + j;
            const int64_t rows = min(square, i1 - i), cols = min(square, n - j);
            if (rows == square && cols == square) {
              tile.multiply(blocks, terms, ai, terms * distance, bj, distance, c, ldc, add);
              continue;
            }
            alignas(64) float edge[square * square];
            tile.multiply(blocks, terms, ai, terms * distance, bj, distance, edge, square, false);
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t q = 0; q < cols; ++q) c[r * ldc + q] = edge[r * square + q] + (add ? c[r * ldc + q] : 0.0f);
          }
        tile.end();
      });
    }
  }
}

#endif

}  // namespace kd::KD_ISA
