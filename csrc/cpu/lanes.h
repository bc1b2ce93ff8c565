// Numbers whose SIMD lanes belong to different matrices: the same operations for all, and none between lanes.
#pragma once

#include "simd.h"

namespace kd::KD_ISA {

// All bits of a lane set, or none: what comparisons of vectors give and `mask ? a : b` takes.
template <class T>
using Mask = typename IndexOf<T>::type;
// A whole number as wide as T, and one in all lanes.
template <class T>
using Word = decltype(Mask<T>{}[0] + 0);
template <class T>
inline Mask<T> whole(int64_t x) {
  return Mask<T>{} + static_cast<Word<T>>(x);
}

template <class T>
struct Real {
  using Scalar = T;
  static constexpr int parts = 1;
  Vector<T> re;
};

template <class T>
struct Complex {
  using Scalar = T;
  static constexpr int parts = 2;
  Vector<T> re, im;
};

template <class N>
using ScalarOf = typename N::Scalar;

// Parts of a lane group's workspace, one behind the other; without memory they are only counted.
template <class T>
class Workspace {
 public:
  explicit Workspace(Vector<T>* memory = nullptr) : memory_(memory) {}
  int64_t vectors() const { return vectors_; }

  template <class U>
  U* take(int64_t count) {
    Vector<T>* const part = memory_ ? memory_ + vectors_ : nullptr;
    vectors_ += count * static_cast<int64_t>(sizeof(U) / sizeof(Vector<T>));
    return reinterpret_cast<U*>(part);
  }

 private:
  Vector<T>* memory_;
  int64_t vectors_ = 0;
};

// The k-th vector of an array of numbers, and one lane of a number's part.
template <class N>
inline Vector<ScalarOf<N>>& real_part(N* x, int64_t k) {
  return reinterpret_cast<Vector<ScalarOf<N>>*>(x)[k];
}
template <class N>
inline ScalarOf<N>& lane(N& x, int part, int l) {
  return reinterpret_cast<ScalarOf<N>*>(&x)[part * kLanes<ScalarOf<N>> + l];
}
template <class N>
inline const ScalarOf<N>& lane(const N& x, int part, int l) {
  return reinterpret_cast<const ScalarOf<N>*>(&x)[part * kLanes<ScalarOf<N>> + l];
}

template <class T>
inline Vector<T> broadcast(T x) {
  return Vector<T>{} + x;
}

template <class N>
inline N from_real(Vector<ScalarOf<N>> re) {
  N x{};
  x.re = re;
  return x;
}

template <class T>
inline Real<T> operator*(Real<T> a, Real<T> b) {
  return {a.re * b.re};
}
template <class T>
inline Complex<T> operator*(Complex<T> a, Complex<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class T>
inline Real<T> operator*(Real<T> a, Vector<T> s) {
  return {a.re * s};
}
template <class T>
inline Complex<T> operator*(Complex<T> a, Vector<T> s) {
  return {a.re * s, a.im * s};
}
template <class T>
inline Real<T> operator+(Real<T> a, Real<T> b) {
  return {a.re + b.re};
}
template <class T>
inline Complex<T> operator+(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T>
inline Real<T> operator-(Real<T> a, Real<T> b) {
  return {a.re - b.re};
}
template <class T>
inline Complex<T> operator-(Complex<T> a, Complex<T> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class T>
inline Real<T> operator-(Real<T> a) {
  return {-a.re};
}
template <class T>
inline Complex<T> operator-(Complex<T> a) {
  return {-a.re, -a.im};
}
template <class T>
inline Real<T> conj(Real<T> a) {
  return a;
}
template <class T>
inline Complex<T> conj(Complex<T> a) {
  return {a.re, -a.im};
}
template <class T>
inline Vector<T> abs2(Real<T> a) {
  return a.re * a.re;
}
template <class T>
inline Vector<T> abs2(Complex<T> a) {
  return a.re * a.re + a.im * a.im;
}
template <class T>
inline Real<T> select(Mask<T> mask, Real<T> a, Real<T> b) {
  return {mask ? a.re : b.re};
}
template <class T>
inline Complex<T> select(Mask<T> mask, Complex<T> a, Complex<T> b) {
  return {mask ? a.re : b.re, mask ? a.im : b.im};
}

// c + a b and c + a* b, every term a fused multiply-add.
template <class T>
inline Real<T> add_product(Real<T> c, Real<T> a, Real<T> b) {
  return {c.re + a.re * b.re};
}
template <class T>
inline Complex<T> add_product(Complex<T> c, Complex<T> a, Complex<T> b) {
  return {(c.re + a.re * b.re) - a.im * b.im, (c.im + a.re * b.im) + a.im * b.re};
}
template <class N>
inline N add_conj_product(N c, N a, N b) {
  return add_product(c, conj(a), b);
}

template <class T>
inline Vector<T> absolute(Vector<T> x) {
  return x < 0 ? -x : x;
}
template <class T>
inline Vector<T> largest_part(Real<T> a) {
  return absolute<T>(a.re);
}
template <class T>
inline Vector<T> largest_part(Complex<T> a) {
  const Vector<T> re = absolute<T>(a.re), im = absolute<T>(a.im);
  return re < im ? im : re;
}

template <class N>
inline Vector<ScalarOf<N>> largest_of(const N* x, int64_t count) {
  Vector<ScalarOf<N>> largest{};
  for (int64_t k = 0; k < count; ++k) {
    const Vector<ScalarOf<N>> part = largest_part(x[k]);
    largest = largest < part ? part : largest;
  }
  return largest;
}

template <class T>
inline Vector<T> square_root(Vector<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return __builtin_ia32_sqrtps512_mask(x, x, -1, 4);
  else
    return __builtin_ia32_sqrtpd512_mask(x, x, -1, 4);
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4)
    return __builtin_ia32_sqrtps256(x);
  else
    return __builtin_ia32_sqrtpd256(x);
#else
  for (int l = 0; l < kLanes<T>; ++l)
    x[l] = sizeof(T) == 4 ? __builtin_sqrtf(static_cast<float>(x[l])) : __builtin_sqrt(static_cast<double>(x[l]));
  return x;
#endif
}

template <class M>
inline bool any(M mask) {
  typedef int64_t Words __attribute__((vector_size(kVectorBytes)));
  Words words = reinterpret_cast<Words>(mask);
#if defined(__AVX__) && !defined(__AVX512F__)
  return !__builtin_ia32_ptestz256(reinterpret_cast<__attribute__((vector_size(32))) long long>(words),
                                   reinterpret_cast<__attribute__((vector_size(32))) long long>(words));
#else
  int64_t all = 0;
  for (int l = 0; l < kVectorBytes / 8; ++l) all |= words[l];
  return all != 0;
#endif
}

template <class T>
struct Format;
template <>
struct Format<float> {
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float lift = 0x1p110f;  // of matrices whose columns are scaled before they are squared
  static constexpr float epsilon = 0x1p-23f, smallest = 0x1p-126f, largest = 0x1.fffffep127f, split = 4097.f;
};
template <>
struct Format<double> {
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double lift = 0x1p990;
  static constexpr double epsilon = 0x1p-52, smallest = 0x1p-1022, largest = 0x1.fffffffffffffp1023, split = 134217729.;
};

// The power of two that brings x > 0 into [1, 2), or as near as powers of two in the normal range do; 1 for x = 0.
template <class T>
inline Vector<T> unit_scale(Vector<T> x) {
  constexpr int bias = Format<T>::bias;
  Mask<T> exponent = reinterpret_cast<Mask<T>>(x) >> Format<T>::mantissa;
  const Mask<T> least = whole<T>(1), most = whole<T>(2 * bias - 1);
  exponent = exponent < least ? least : exponent;
  exponent = exponent > most ? most : exponent;
  const Vector<T> scale = reinterpret_cast<Vector<T>>((2 * bias - exponent) << Format<T>::mantissa);
  return x > 0 ? scale : broadcast<T>(1);
}

// x/|x|, or 1 for 0, and |x|: of length 1 to the last digits even where the square of x would leave the range.
template <class N>
inline N direction(N x, Vector<ScalarOf<N>>& size) {
  using T = ScalarOf<N>;
  const Vector<T> scale = unit_scale<T>(largest_part(x)), one = broadcast<T>(1);
  const N near = x * scale;
  const Vector<T> length = square_root<T>(abs2(near));
  size = length / scale;
  return select(length > 0, near * (1 / length), from_real<N>(one));
}

// The same value, but the compiler does not know: neither fused with nor replaced by what it was computed from.
template <class V>
inline V opaque(V x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// A number in registers: the compiler would read each of its parts from memory for every use.
template <class T>
inline Real<T> held(const Real<T>& x) {
  return {opaque(x.re)};
}
template <class T>
inline Complex<T> held(const Complex<T>& x) {
  return {opaque(x.re), opaque(x.im)};
}

// a b = product + error, exactly.
template <class T>
struct Exact {
  Vector<T> product, error;
};
template <class T>
inline Exact<T> exact_product(Vector<T> a, Vector<T> b) {
  const Vector<T> product = opaque(a * b);
#if defined(__FMA__) || defined(__aarch64__)
  return {product, opaque(a) * b - product};  // one rounding, as -ffp-contract=fast fuses it
#else
  const auto high = [](Vector<T> x) {
    const Vector<T> wide = opaque(x * Format<T>::split);
    return opaque(wide - opaque(wide - x));
  };
  const Vector<T> ah = high(a), al = opaque(a - ah), bh = high(b), bl = opaque(b - bh);
  return {product, ((ah * bh - product) + ah * bl + al * bh) + al * bl};
#endif
}

// 1 − a and 1 − a − b, where |a| and |b| are at most about 1, and what rounding lost of them.
template <class T>
inline Vector<T> one_minus(Exact<T> a) {
  const Vector<T> sum = opaque(1 - a.product);
  return sum + (((1 - sum) - a.product) - a.error);
}
template <class T>
inline Vector<T> one_minus(Exact<T> a, Exact<T> b) {
  const Vector<T> first = opaque(1 - a.product), lost = (1 - first) - a.product;
  const Vector<T> sum = opaque(first - b.product), back = opaque(sum - first);
  const Vector<T> lost_too = (first - opaque(sum - back)) - (b.product + back);
  return sum + ((lost + lost_too) - (a.error + b.error));
}

// 1 − |a|², to nearly its last digit however close |a| is to 1.
template <class T>
inline Vector<T> one_minus_abs2(Real<T> a) {
  return one_minus<T>(exact_product<T>(a.re, a.re));
}
template <class T>
inline Vector<T> one_minus_abs2(Complex<T> a) {
  return one_minus<T>(exact_product<T>(a.re, a.re), exact_product<T>(a.im, a.im));
}

template <class T>
inline Real<T> reciprocal(Real<T> a) {
  return {1 / a.re};
}
template <class T>
inline Complex<T> reciprocal(Complex<T> a) {
  return conj(a) * (1 / abs2(a));
}

}  // namespace kd::KD_ISA
