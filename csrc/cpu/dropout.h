// Dropout masks drawn where they are used: which elements of a row survive is a function of seed, offset, row and
// column.
#pragma once

#include "../common/philox.h"
#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kd::KD_ISA {

typedef uint64_t Longs __attribute__((vector_size(kVectorBytes)));

// The products of the lower halves.
inline Longs multiply_halves(Longs a, Longs b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Longs>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Longs>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Longs>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

class Dropout {
 public:
  Dropout() = default;
  Dropout(double p, uint64_t seed, uint64_t offset)
      : active_(p > 0), scale_(1 / (1 - p)), seed_(seed), offset_(offset) {
    const double exact = __builtin_nearbyint(p * 4294967296.0);
    threshold_ = exact < 4294967295.0 ? static_cast<uint32_t>(exact) : 0xFFFFFFFFu;
  }

  explicit operator bool() const { return active_; }

  // to[j] = from[j] / (1 − p) where (row, col + j) is kept, else 0; j < n, and col is a multiple of 4.
  template <class T, class S>
  void apply(int64_t row, int64_t col, int64_t n, const S* from, T* to) const {
    uint32_t words[segment];
    for (int64_t j0 = 0; j0 < n; j0 += segment) {
      const int64_t count = min<int64_t>(segment, n - j0);
      draw(row, col + j0, count, words);
      choose(words, count, from + j0, to + j0);
    }
  }

  static constexpr int segment = 128;  // what is drawn at a time

  // The words of (row, col + j) for j < count, at most a segment; room for a whole one.
  void draw(int64_t row, int64_t col, int64_t count, uint32_t* words) const {
    draw_blocks(static_cast<uint32_t>(row), static_cast<uint32_t>(col / 4), count, words);
  }

  // As apply(), by words that were drawn; with `adds` it is added to what is there.
  template <bool adds = false, class T, class S>
  void choose(const uint32_t* words, int64_t count, const S* from, T* to) const {
    const T scale = static_cast<T>(scale_);
    const uint32_t limit = threshold_;
    auto put = [=](int64_t j) {
      const T x = words[j] >= limit ? scale * load<T>(from + j) : T{};
      to[j] = adds ? to[j] + x : x;
    };
    if (count == segment)  // a length that the compiler knows
      for (int j = 0; j < segment; ++j) put(j);
    else
      for (int64_t j = 0; j < count; ++j) put(j);
  }

 private:
  // At least `count` words of a row, from a block on; a block's counter in each 64-bit lane, in its lower half.
  void draw_blocks(uint32_t row, uint32_t block, int64_t count, uint32_t* words) const {
    constexpr int lanes = kVectorBytes / 8;
    const Longs low = {}, first = low + 0xFFFFFFFFu;
    const Longs offset_low = low + (offset_ & 0xFFFFFFFFu), offset_high = low + (offset_ >> 32);
    const Longs row_words = low + row, multiplier0 = low + Philox::multipliers[0],
                multiplier1 = low + Philox::multipliers[1];
    const uint64_t seed = seed_;
    Longs lane, even, odd;  // block numbers; and the order that puts a block's four words side by side
    for (int l = 0; l < lanes; ++l) {
      lane[l] = static_cast<uint64_t>(l);
      even[l] = static_cast<uint64_t>(l / 2 + (l % 2) * lanes);
      odd[l] = even[l] + lanes / 2;
    }
    typedef uint64_t Stored __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
    constexpr int chains = 2;  // in flight at once: a round waits for the one before it
    for (int64_t j = 0; j < count; j += chains * 4 * lanes) {
      Longs c0[chains], c1[chains], c2[chains], c3[chains];
      for (int c = 0; c < chains; ++c, block += lanes) {
        c0[c] = lane + block;
        c1[c] = row_words;
        c2[c] = offset_low;
        c3[c] = offset_high;
      }
      uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
      for (int round = 0; round < Philox::rounds; ++round) {
#pragma GCC unroll 2
        for (int c = 0; c < chains; ++c) {  // upper halves hold what nobody reads
          const Longs product0 = multiply_halves(c0[c], multiplier0), product1 = multiply_halves(c2[c], multiplier1);
          c0[c] = (product1 >> 32) ^ c1[c] ^ (low + key0);
          c1[c] = product1;
          c2[c] = (product0 >> 32) ^ c3[c] ^ (low + key1);
          c3[c] = product0;
        }
        key0 += Philox::weyl[0];
        key1 += Philox::weyl[1];
      }
      for (int c = 0; c < chains; ++c) {
        const Longs words01 = (c0[c] & first) | (c1[c] << 32), words23 = (c2[c] & first) | (c3[c] << 32);
        *reinterpret_cast<Stored*>(words + j + c * 4 * lanes) = __builtin_shuffle(words01, words23, even);
        *reinterpret_cast<Stored*>(words + j + c * 4 * lanes + 2 * lanes) = __builtin_shuffle(words01, words23, odd);
      }
    }
  }

  bool active_ = false;
  double scale_ = 1;
  uint64_t seed_ = 0, offset_ = 0;
  uint32_t threshold_ = 0;
};

}  // namespace kd::KD_ISA
