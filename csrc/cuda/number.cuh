// Real and complex numbers behind one set of names, and 1 − a b* without cancellation.
#pragma once

#include <limits>

#include "launch.h"
#include "tensor.h"

namespace kd {

template <typename R>
struct alignas(2 * sizeof(R)) Complex {
  R re, im;
};

template <typename T>
struct RealOf {
  using type = T;
};
template <typename R>
struct RealOf<Complex<R>> {
  using type = R;
};
template <typename T>
using Real = typename RealOf<T>::type;

template <typename R>
struct Limits {  // device code may use these constants, but not call std::numeric_limits
  static constexpr R tiny = std::numeric_limits<R>::min(), epsilon = std::numeric_limits<R>::epsilon();
  static constexpr R nan = std::numeric_limits<R>::quiet_NaN();
  static constexpr int max_exponent = std::numeric_limits<R>::max_exponent;
};

#define KD_REAL(R)      \
  template <typename R> \
  __device__ __forceinline__

KD_REAL(R) R conj(R a) {
  return a;
}
KD_REAL(R) R abs2(R a) {
  return a * a;
}
KD_REAL(R) R largest_part(R a) {
  return fabs(a);
}
KD_REAL(R) bool finite(R a) {
  return isfinite(a);
}
KD_REAL(R) R inverse(R a) {
  return R(1) / a;
}

KD_REAL(R) Complex<R> operator+(Complex<R> a, Complex<R> b) {
  return {a.re + b.re, a.im + b.im};
}
KD_REAL(R) Complex<R> operator-(Complex<R> a, Complex<R> b) {
  return {a.re - b.re, a.im - b.im};
}
KD_REAL(R) Complex<R> operator*(Complex<R> a, R s) {
  return {a.re * s, a.im * s};
}
KD_REAL(R) Complex<R> operator*(R s, Complex<R> a) {
  return {a.re * s, a.im * s};
}
KD_REAL(R) Complex<R> operator*(Complex<R> a, Complex<R> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
KD_REAL(R) Complex<R> conj(Complex<R> a) {
  return {a.re, -a.im};
}
KD_REAL(R) R abs2(Complex<R> a) {
  return a.re * a.re + a.im * a.im;
}
KD_REAL(R) R largest_part(Complex<R> a) {
  return fmax(fabs(a.re), fabs(a.im));
}
KD_REAL(R) bool finite(Complex<R> a) {
  return isfinite(a.re) && isfinite(a.im);
}
KD_REAL(R) Complex<R> inverse(Complex<R> a) {
  return conj(a) * (R(1) / abs2(a));
}

template <typename T>
__device__ __forceinline__ T number(Real<T> re) {
  if constexpr (sizeof(T) == sizeof(Real<T>))
    return re;
  else
    return {re, Real<T>(0)};
}

template <typename T>
__device__ __forceinline__ T not_a_number() {
  constexpr Real<T> nan = Limits<Real<T>>::nan;
  if constexpr (sizeof(T) == sizeof(Real<T>))
    return nan;
  else
    return {nan, nan};
}

// |a|, for |a| whose square neither overflows nor matters when it underflows.
template <typename T>
__device__ __forceinline__ Real<T> magnitude(T a) {
  return sqrt(abs2(a));
}

// Rounded as written: the compiler may not fuse these.
__device__ __forceinline__ float product(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ __forceinline__ double product(double a, double b) {
  return __dmul_rn(a, b);
}
__device__ __forceinline__ float sum(float a, float b) {
  return __fadd_rn(a, b);
}
__device__ __forceinline__ double sum(double a, double b) {
  return __dadd_rn(a, b);
}
__device__ __forceinline__ float fused(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
__device__ __forceinline__ double fused(double a, double b, double c) {
  return __fma_rn(a, b, c);
}

// a − p with what the rounding lost (two-sum, Knuth).
template <typename R>
__device__ __forceinline__ R difference(R a, R p, R& lost) {
  const R s = sum(a, -p), back = sum(s, -a);
  lost = sum(lost, sum(sum(a, -sum(s, -back)), sum(-p, -back)));
  return s;
}

// 1 − |a|², to its last digits however close |a| is to 1.
KD_REAL(R) R one_minus_abs2(R a) {
  const R p = product(a, a);
  R lost = -fused(a, a, -p);
  const R s = difference(R(1), p, lost);
  return sum(s, lost);
}
KD_REAL(R) R one_minus_abs2(Complex<R> a) {
  const R p = product(a.re, a.re), q = product(a.im, a.im);
  R lost = -sum(fused(a.re, a.re, -p), fused(a.im, a.im, -q));
  const R s = difference(R(1), p, lost), t = difference(s, q, lost);
  return sum(t, lost);
}

#undef KD_REAL

// body(0 of the call's number type)
template <typename Call, typename Body>
auto with_number(const Call& call, Body body) {
  const bool single = call.dtype == DType::float32;
  if (call.is_complex) return single ? body(Complex<float>{}) : body(Complex<double>{});
  return single ? body(float{}) : body(double{});
}

}  // namespace kd
