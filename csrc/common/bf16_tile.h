// Products of bfloat16 numbers with float32 sums, by instructions that do nothing else. They exist in some AVX-512
// processors only, so their kernels are apart from the copies for each instruction set and are reached by pointers.
#pragma once

#include <cstdint>

namespace kd {

// A block of a product: C (32, 32) [+]= A (32, k) · B (k, 32), with k in `blocks` blocks of 32.
//
// A is two rows of tiles `a_distance` numbers apart, B two columns of tiles `b_distance` apart. A tile is 16 lines of A
// by 32 k, line after line; or, of B, 16 pairs of k by 16 columns by the two of a pair. A may be a sum of `terms`
// matrices, each `blocks` tiles behind the one before, that all meet B.
struct Bf16Tile {
  void (*begin)();  // before a thread multiplies, and after it did
  void (*end)();
  void (*multiply)(int64_t blocks, int terms, const uint16_t* a, int64_t a_distance, const uint16_t* b,
                   int64_t b_distance, float* c, int64_t ldc, bool accumulate);
};

constexpr int64_t kBf16Lines = 16, kBf16Depth = 32, kBf16Numbers = kBf16Lines * kBf16Depth;

bool amx_supported();  // by the processor and, asked once, the system
bool avx512_bf16_supported();
extern const Bf16Tile amx_tile, avx512_bf16_tile;

}  // namespace kd
