// A 64-bit fingerprint of a matrix's bytes, at the speed of reading them: tells whether it is still the same.
//
// Blocks of 256 words are hashed by sums of products with a key (NH: Black, Halevi, Krawczyk, Krovetz, Rogaway 1999),
// and the blocks' hashes by a polynomial. The same for every thread count and instruction set.
#pragma once

#include "simd.h"

namespace kd::KD_ISA {

constexpr int64_t kBlockWords = 256;

struct FingerprintKey {
  uint32_t words[kBlockWords];
  constexpr FingerprintKey() : words{} {
    uint64_t state = 0x9e3779b97f4a7c15u;
    for (uint32_t& word : words) {  // splitmix64
      uint64_t z = state += 0x9e3779b97f4a7c15u;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
      word = static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
    }
  }
};
inline constexpr FingerprintKey kKey;

inline uint64_t hash_block(const unsigned char* bytes, int64_t count) {
  uint32_t words[kBlockWords];
  if (count < kBlockWords * 4) __builtin_memset(words, 0, sizeof words);
  __builtin_memcpy(words, bytes, static_cast<size_t>(count));
  uint64_t sum = static_cast<uint64_t>(count);
  for (int64_t i = 0; i < kBlockWords / 2; ++i)
    sum += static_cast<uint64_t>(words[i] + kKey.words[i]) *
           (words[i + kBlockWords / 2] + kKey.words[i + kBlockWords / 2]);
  return sum;
}

// Rows of `row_bytes` adjacent bytes, `stride_bytes` apart.
inline uint64_t fingerprint(const void* data, int64_t rows, int64_t row_bytes, int64_t stride_bytes, int threads) {
  constexpr uint64_t prime = 0x9e3779b97f4a7c15u;
  const int64_t grain = max<int64_t>(1, (int64_t{1} << 18) / max<int64_t>(row_bytes, 1));
  const int64_t chunks = ceil_div(rows, grain);
  Buffer<uint64_t> hashes(chunks);
  parallel_for(threads, chunks, [&](int64_t chunk, int) {
    uint64_t hash = 0;
    for (int64_t i = chunk * grain; i < min(rows, (chunk + 1) * grain); ++i) {
      const auto* row = static_cast<const unsigned char*>(data) + i * stride_bytes;
      for (int64_t b = 0; b < row_bytes; b += kBlockWords * 4)
        hash = hash * prime + hash_block(row + b, min<int64_t>(kBlockWords * 4, row_bytes - b));
    }
    hashes[chunk] = hash;
  });
  uint64_t total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total = total * prime + hashes[chunk];
  return total;
}

}  // namespace kd::KD_ISA
