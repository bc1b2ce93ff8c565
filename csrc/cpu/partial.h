// The first numbers of a vector from and to memory, of which nothing behind them is touched.
#pragma once

#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace kd::KD_ISA {

#if defined(__AVX512F__)
template <class T>
inline Vector<T> load_first(const T* p, int count) {
  if constexpr (sizeof(T) == 4)
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  else
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p);
}
template <class T>
inline void store_first(T* p, Vector<T> x, int count) {
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), x);
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), x);
}
#elif defined(__AVX2__)
// All bits of the first lanes.
template <class T>
inline __m256i first_lanes(int count) {
  typename IndexOf<T>::type lane;
  for (int l = 0; l < kLanes<T>; ++l) lane[l] = l;
  return reinterpret_cast<__m256i>(lane < count);
}
template <class T>
inline Vector<T> load_first(const T* p, int count) {
  if constexpr (sizeof(T) == 4)
    return _mm256_maskload_ps(p, first_lanes<T>(count));
  else
    return _mm256_maskload_pd(p, first_lanes<T>(count));
}
template <class T>
inline void store_first(T* p, Vector<T> x, int count) {
  if constexpr (sizeof(T) == 4)
    _mm256_maskstore_ps(p, first_lanes<T>(count), x);
  else
    _mm256_maskstore_pd(p, first_lanes<T>(count), x);
}
#else
template <class T>
inline Vector<T> load_first(const T* p, int count) {
  Vector<T> x{};
  for (int l = 0; l < count; ++l) x[l] = p[l];
  return x;
}
template <class T>
inline void store_first(T* p, Vector<T> x, int count) {
  for (int l = 0; l < count; ++l) p[l] = x[l];
}
#endif

}  // namespace kd::KD_ISA
