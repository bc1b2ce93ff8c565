// Elementary functions of a vector. In float32 by polynomials fitted to a few units of rounding, in float64 by the C
// library, element by element. NaN stays NaN.
#pragma once

#include "simd.h"

namespace kd::KD_ISA {

template <class F>
inline Vector<double> by_element(Vector<double> x, F&& f) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = f(x[l]);
  return x;
}

// x as an integer vector of the same shape, bit by bit, and back.
inline auto bits_of(Vector<float> x) {
  return reinterpret_cast<typename IndexOf<float>::type>(x);
}
inline Vector<float> from_bits(typename IndexOf<float>::type x) {
  return reinterpret_cast<Vector<float>>(x);
}

template <int count>
inline Vector<float> polynomial(Vector<float> x, const float (&c)[count]) {
  Vector<float> y = c[count - 1] - Vector<float>{};
  for (int i = count - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

// e^x for x ≤ 0; 0 where that is below the normal numbers.
inline Vector<float> exp_negative(Vector<float> x) {
  constexpr float lowest = -87.3f, shift = 12582912.0f;  // 1.5 · 2²³: what is added to it is rounded to an integer
  constexpr float c[] = {1.0000000005585965f,  1.000000036539113f,    0.4999999203230322f,   0.16666419190362075f,
                         0.04166823180506907f, 0.008374898361934528f, 0.0013836741821117678f};
  const auto tiny = x < lowest;
  const Vector<float> y = tiny ? lowest - Vector<float>{} : x;
  const Vector<float> t = y * 1.44269504f + shift, n = t - shift;
  const Vector<float> r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  const auto exponent = (bits_of(t) - bits_of(shift - Vector<float>{}) + 127) << 23;
  return tiny ? Vector<float>{} : polynomial(r, c) * from_bits(exponent);
}
inline Vector<double> exp_negative(Vector<double> x) {
  return by_element(x, [](double v) { return __builtin_exp(v); });
}

// log(1 + x) for 0 ≤ x ≤ 1: 2 artanh(x/(2 + x)).
inline Vector<float> log_one_plus(Vector<float> x) {
  constexpr float c[] = {1.0000000039815105f, 0.3333315658736154f, 0.20012495758583793f, 0.13979620045078694f,
                         0.14092666981096375f};
  const Vector<float> s = x / (2.0f + x);
  return 2.0f * s * polynomial(s * s, c);
}
inline Vector<double> log_one_plus(Vector<double> x) {
  return by_element(x, [](double v) { return __builtin_log1p(v); });
}

inline Vector<float> tanh(Vector<float> x) {
  constexpr float c[] = {0.999999997510991f,    -0.3333328325734218f,  0.13331688959437107f,
                         -0.05376870464879051f, 0.020753628715212403f, -0.0058521684667727555f};
  const Vector<float> size = x < 0.0f ? -x : x, e = exp_negative(-2.0f * size);
  const Vector<float> far = (1.0f - e) / (1.0f + e), near = x * polynomial(x * x, c);
  return size < 0.6f ? near : x < 0.0f ? -far : far;
}
inline Vector<double> tanh(Vector<double> x) {
  return by_element(x, [](double v) { return __builtin_tanh(v); });
}

// 1/x of a normal x whose inverse is normal, which is not the division that AVX-512 is slow at.
inline Vector<float> inverse(Vector<float> x) {
#if defined(__AVX512F__)
  const Vector<float> near = __builtin_ia32_rcp14ps512_mask(x, x, -1);
  return near * (2.0f - x * near);
#else
  return 1.0f / x;
#endif
}
inline Vector<double> inverse(Vector<double> x) {
  return 1 / x;
}

// 1/(1 + e⁻ˣ)
template <class T>
inline Vector<T> logistic(Vector<T> x) {
  const Vector<T> e = exp_negative(x < 0 ? x : -x), share = inverse(1 + e);
  return x < 0 ? e * share : share;
}

// The normal distribution's φ(x) and Φ(x), both of e^(−x²/2); Φ keeps its relative precision far below 0 too.
template <class T>
struct Normal {
  Vector<T> density, cumulative;
};
inline Normal<float> normal(Vector<float> x) {
  constexpr float c[] = {6.686749797146785e-06f, 0.11949587607599926f,  0.12186210606083087f,
                         0.09491056285685671f,   0.14200368791426551f,  -0.07573796930915959f,
                         0.2279892878038386f,    -0.16884188799543648f, 0.03831167839699102f};  // e^(x²/2) Φ(−|x|)
  const Vector<float> size = x < 0.0f ? -x : x, e = exp_negative(-0.5f * x * x);
  const Vector<float> near = size > 16.0f ? 16.0f - Vector<float>{} : size;  // beyond that e is 0
  const Vector<float> below = e * polynomial(inverse(1.0f + 0.3f * near), c);
  return {0.3989422804014327f * e, x < 0.0f ? below : 1.0f - below};
}
inline Normal<double> normal(Vector<double> x) {
  return {0.3989422804014327 * exp_negative(-0.5 * x * x),
          by_element(x, [](double v) { return 0.5 * __builtin_erfc(-0.7071067811865476 * v); })};
}

// log(eᵃ + eᵇ); −∞ is the logarithm of 0.
template <class T>
inline Vector<T> log_add(Vector<T> a, Vector<T> b) {
  const Vector<T> high = a < b ? b : a, low = a < b ? a : b;
  const Vector<T> none = -__builtin_inf() - Vector<T>{};
  return high == none ? low : high + log_one_plus(exp_negative(low - high));
}

template <class T>
inline double total(Vector<T> x) {
  double sum = 0;
  for (int l = 0; l < kLanes<T>; ++l) sum += x[l];
  return sum;
}

}  // namespace kd::KD_ISA
