#include "bf16_tile.h"

#if defined(__x86_64__)

#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kd {
namespace {

constexpr int64_t kRow = kBf16Depth * sizeof(uint16_t);  // bytes of a tile's line

// What the compiler does not know the processor need not have.
#if __has_include(<amxbf16intrin.h>)
#define KD_COMPILES_AMX
#endif

#ifdef KD_COMPILES_AMX

// ---- AMX: eight tile registers, four of them sums -------------------------------------------------------------------

#define KD_AMX __attribute__((target("amx-tile,amx-bf16")))

// Eight registers of 16 lines. In memory that the compiler cannot leave unwritten: it takes the instruction to read
// less.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns[16] = {kRow, kRow, kRow, kRow, kRow, kRow, kRow, kRow};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig config;

KD_AMX void amx_begin() {
  _tile_loadconfig(&config);
}

KD_AMX void amx_end() {
  _tile_release();
}

KD_AMX void amx_multiply(int64_t blocks, int terms, const uint16_t* a, int64_t a_distance, const uint16_t* b,
                         int64_t b_distance, float* c, int64_t ldc, bool accumulate) {
  const int64_t stride = ldc * static_cast<int64_t>(sizeof(float));
  float* low = c + kBf16Lines * ldc;
  if (accumulate) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + kBf16Lines, stride);
    _tile_loadd(2, low, stride);
    _tile_loadd(3, low + kBf16Lines, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int t = 0; t < terms; ++t) {
    const uint16_t* column = b;
    for (int64_t k = 0; k < blocks; ++k, a += kBf16Numbers, column += kBf16Numbers) {
      _tile_loadd(4, a, kRow);
      _tile_loadd(6, column, kRow);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, column + b_distance, kRow);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + a_distance, kRow);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + kBf16Lines, stride);
  _tile_stored(2, low, stride);
  _tile_stored(3, low + kBf16Lines, stride);
}

bool ask_for_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a, b, c, d;
  __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if ((d & bf16) == 0 || (d & tile) == 0) return false;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

#endif

// ---- AVX-512 BF16: eight lines of C at a time -----------------------------------------------------------------------

#define KD_BF16 __attribute__((target("avx512f,avx512bf16")))

void nothing() {}

KD_BF16 void avx512_bf16_multiply(int64_t blocks, int terms, const uint16_t* a, int64_t a_distance, const uint16_t* b,
                                  int64_t b_distance, float* c, int64_t ldc, bool accumulate) {
  constexpr int lines = 8;
  constexpr int64_t pairs = kBf16Depth / 2;
  for (int64_t i0 = 0; i0 < 2 * kBf16Lines; i0 += lines) {
    const uint16_t* from = a + i0 / kBf16Lines * a_distance + i0 % kBf16Lines * kBf16Depth;
    __m512 sum[lines][2];
#pragma GCC unroll 8
    for (int i = 0; i < lines; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j)
        sum[i][j] = accumulate ? _mm512_loadu_ps(c + (i0 + i) * ldc + j * kBf16Lines) : _mm512_setzero_ps();
    for (int t = 0; t < terms; ++t) {
      const uint16_t* column = b;
      for (int64_t k = 0; k < blocks; ++k, from += kBf16Numbers, column += kBf16Numbers)
        for (int64_t pair = 0; pair < pairs; ++pair) {
          const __m512i b0 = _mm512_loadu_si512(column + pair * kBf16Depth);
          const __m512i b1 = _mm512_loadu_si512(column + b_distance + pair * kBf16Depth);
#pragma GCC unroll 8
          for (int i = 0; i < lines; ++i) {
            int two;
            __builtin_memcpy(&two, from + i * kBf16Depth + 2 * pair, sizeof two);
            const __m512i ai = _mm512_set1_epi32(two);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], (__m512bh)ai, (__m512bh)b0);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], (__m512bh)ai, (__m512bh)b1);
          }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < lines; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) _mm512_storeu_ps(c + (i0 + i) * ldc + j * kBf16Lines, sum[i][j]);
  }
}

}  // namespace

bool amx_supported() {
#ifdef KD_COMPILES_AMX
  static const bool granted = ask_for_amx();
  return granted;
#else
  return false;
#endif
}

bool avx512_bf16_supported() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
  return (a & (1u << 5)) != 0;
}

#ifdef KD_COMPILES_AMX
const Bf16Tile amx_tile{amx_begin, amx_end, amx_multiply};
#else
const Bf16Tile amx_tile{};
#endif
const Bf16Tile avx512_bf16_tile{nothing, nothing, avx512_bf16_multiply};

}  // namespace kd

#else

namespace kd {

bool amx_supported() {
  return false;
}

bool avx512_bf16_supported() {
  return false;
}

}  // namespace kd

#endif
