// What each instruction set's copy is built from. Everything lives in a namespace named after the instruction set
// (KD_ISA), and nothing from the standard library is instantiated here: a weak symbol compiled for AVX-512 could
// otherwise be the one that the linker keeps for every processor.
#pragma once

#include "../common/memory.h"
#include "../common/tensor.h"
#include "../common/thread_pool.h"

namespace kd::KD_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
// What __builtin_shuffle takes: an integer vector of the same shape.
template <class T>
struct IndexOf;
template <>
struct IndexOf<float> {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct IndexOf<double> {
  typedef int64_t type __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using UnalignedVector = typename VectorOf<T>::unaligned;

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// How a tensor stores what is computed in T.
template <class T>
constexpr DType kDType = sizeof(T) == 8 ? DType::float64 : DType::float32;

// Conversions between what a tensor stores and what is computed with.
template <class T>
inline T load(const float* p) {
  return static_cast<T>(*p);
}
template <class T>
inline T load(const double* p) {
  return static_cast<T>(*p);
}
template <class T>
inline T load(const bfloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return static_cast<T>(value);
}

// kLanes<T> adjacent elements.
template <class T, class S>
inline Vector<T> load_vector(const S* p) {
  Vector<T> v;
  for (int l = 0; l < kLanes<T>; ++l) v[l] = load<T>(p + l);
  return v;
}
template <>
inline Vector<float> load_vector<float>(const float* p) {
  return *reinterpret_cast<const UnalignedVector<float>*>(p);
}
template <>
inline Vector<double> load_vector<double>(const double* p) {
  return *reinterpret_cast<const UnalignedVector<double>*>(p);
}
template <>
inline Vector<float> load_vector<float>(const bfloat16* p) {
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  return reinterpret_cast<Vector<float>>(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}

template <class T>
inline void store(double* p, T value) {
  *p = value;
}
template <class T>
inline void store(float* p, T value) {
  *p = static_cast<float>(value);
}
template <class T>
inline void store(bfloat16* p, T value) {  // round to nearest even; NaN stays NaN
  const float single = static_cast<float>(value);
  uint32_t bits;
  __builtin_memcpy(&bits, &single, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(single != single ? (bits >> 16) | 0x40u : rounded);
}

// Call f with a null pointer of the element type that `dtype` names.
template <class F>
inline void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f(static_cast<float*>(nullptr));
    case DType::float64:
      return f(static_cast<double*>(nullptr));
    case DType::bfloat16:
      return f(static_cast<bfloat16*>(nullptr));
  }
}

// Owned, aligned, uninitialised workspace.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) : data_(static_cast<T*>(allocate(static_cast<size_t>(count) * sizeof(T)))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    T* mine = data_;
    data_ = other.data_;
    other.data_ = mine;
    return *this;
  }
  ~Buffer() { release(data_); }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
};

// Owned objects, made by their default constructors.
template <class T>
class List {
 public:
  explicit List(int64_t count) : items_(new T[static_cast<size_t>(count)]) {}
  List(const List&) = delete;
  List& operator=(const List&) = delete;
  ~List() { delete[] items_; }
  T& operator[](int64_t i) const { return items_[i]; }

 private:
  T* items_;
};

// As many threads as the work is worth: waking one costs about half a million multiply-adds.
inline int useful_threads(int threads, int64_t multiply_adds) {
  return static_cast<int>(min<int64_t>(threads, 1 + multiply_adds / 500'000));
}

// f(index, worker) for index in [0, count).
template <class F>
inline void parallel_for(int threads, int64_t count, const F& f) {
  parallel_run(
      threads, count, [](void* context, int64_t i, int worker) { (*static_cast<const F*>(context))(i, worker); },
      const_cast<F*>(&f));
}

// f(begin, end) for chunks of `grain` indices of [0, count).
template <class F>
inline void parallel_chunks(int threads, int64_t count, int64_t grain, const F& f) {
  auto body = [&](int64_t chunk, int) { f(chunk * grain, min(count, (chunk + 1) * grain)); };
  parallel_for(threads, ceil_div(count, grain), body);
}

}  // namespace kd::KD_ISA
