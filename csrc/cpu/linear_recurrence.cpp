#include "kdkernels/linear_recurrence.h"

#include "partial.h"

namespace kd::KD_ISA {
namespace {

constexpr int kHeld = 4;                   // vectors of states in registers: enough to hide what a step waits for
constexpr int64_t kChunkBytes = 64 << 10;  // of one operand, walked block by block before time goes on
constexpr int64_t kMostSteps = 64;         // ∂λ is summed in T over so many steps, beyond that in float64
constexpr int64_t kPartials = 64;          // of a ∂λ that the sequences share, whatever the number of threads
constexpr int64_t kLeast = 64;             // bytes of states that are worth a task of their own

// x with the parts of each complex number exchanged.
inline Vector<float> exchanged(Vector<float> x) {
#if defined(__AVX512F__)
  return __builtin_shuffle(x, IndexOf<float>::type{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
#elif defined(__AVX2__)
  return __builtin_shuffle(x, IndexOf<float>::type{1, 0, 3, 2, 5, 4, 7, 6});
#else
  return __builtin_shuffle(x, IndexOf<float>::type{1, 0, 3, 2});
#endif
}
inline Vector<double> exchanged(Vector<double> x) {
#if defined(__AVX512F__)
  return __builtin_shuffle(x, IndexOf<double>::type{1, 0, 3, 2, 5, 4, 7, 6});
#elif defined(__AVX2__)
  return __builtin_shuffle(x, IndexOf<double>::type{1, 0, 3, 2});
#else
  return __builtin_shuffle(x, IndexOf<double>::type{1, 0});
#endif
}

// λ ready to multiply numbers as they lie: (re, re) and (−im, im) beside each other.
template <class T, bool is_complex>
struct Factor {
  Vector<T> re{}, im{};

  Factor() = default;
  Factor(const T* Lambda, int count, bool conjugate) {
    for (int l = 0; l < count; ++l) {
      re[l] = is_complex ? Lambda[l & ~1] : Lambda[l];
      if (is_complex) im[l] = (l % 2 == 0) == conjugate ? Lambda[l | 1] : -Lambda[l | 1];
    }
  }
  // c + λ x
  Vector<T> times_plus(Vector<T> x, Vector<T> c) const {
    c = c + re * x;
    return is_complex ? c + im * exchanged(x) : c;
  }
};

// Σ g ⊙ h*: in T for a while, from which it is moved into float64.
template <class T, bool is_complex>
struct Sum {
  Vector<T> straight{}, crossed{};

  void add(Vector<T> g, Vector<T> h) {
    straight = straight + g * h;
    if (is_complex) crossed = crossed + g * exchanged(h);
  }
  void move_to(double* total, int count) const {
    if (is_complex)
      for (int l = 0; l < count; l += 2) {
        total[l] += double(straight[l]) + double(straight[l + 1]);
        total[l + 1] += double(crossed[l + 1]) - double(crossed[l]);
      }
    else
      for (int l = 0; l < count; ++l) total[l] += double(straight[l]);
  }
};

// `held` vectors of states, the last of them perhaps not full.
template <class T, int held, bool full>
struct Block {
  int64_t at;  // the first number
  int last;    // numbers of the last vector

  Vector<T> read(const T* row, int v) const {
    const T* from = row + at + v * kLanes<T>;
    return full || v + 1 < held ? load_vector<T>(from) : load_first<T>(from, last);
  }
  void write(T* row, int v, Vector<T> x) const {
    T* to = row + at + v * kLanes<T>;
    if (full || v + 1 < held)
      *reinterpret_cast<UnalignedVector<T>*>(to) = x;
    else
      store_first<T>(to, x, last);
  }
  int count(int v) const { return full || v + 1 < held ? kLanes<T> : last; }
};

// Call f with each block of the numbers [0, count).
template <class T, class F>
void for_blocks(int64_t count, const F& f) {
  static_assert(kHeld == 4);
  constexpr int lanes = kLanes<T>;
  int64_t at = 0;
  for (; at + kHeld * lanes <= count; at += kHeld * lanes) f(Block<T, kHeld, true>{at, lanes});
  const int rest = static_cast<int>(count - at), vectors = static_cast<int>(ceil_div(rest, lanes));
  const int last = rest - (vectors - 1) * lanes;
  if (vectors == 4) f(Block<T, 4, false>{at, last});
  if (vectors == 3) f(Block<T, 3, false>{at, last});
  if (vectors == 2) f(Block<T, 2, false>{at, last});
  if (vectors == 1) f(Block<T, 1, false>{at, last});
}

// Of a block's vectors.
template <class T, bool is_complex, int held>
struct Factors {
  Factor<T, is_complex> of[held];

  template <class B>
  Factors(const B& block, const T* Lambda, bool conjugate) {
    for (int v = 0; v < held; ++v) of[v] = {Lambda + block.at + v * kLanes<T>, block.count(v), conjugate};
  }
};

// One task's share: some states of some sequences. Rows follow each other in the order of the recurrence.
template <class T, bool is_complex>
struct Share {
  const LinearRecurrence& call;
  int64_t at, count;  // its numbers within a row
  int64_t row = call.order * (is_complex ? 2 : 1), stride = call.reverse ? -row : row;
  // by the row, not the share: sums end with a chunk, and shares differ between numbers of threads
  int64_t chunk = max<int64_t>(1, min(kMostSteps, kChunkBytes / (row * int64_t(sizeof(T)))));

  template <class P>
  P* first(P* data, int64_t sequence) const {
    return data + sequence * call.steps * row + (call.reverse ? (call.steps - 1) * row : 0) + at;
  }
  const T* Lambda(int64_t sequence) const {
    return static_cast<const T*>(call.Lambda.data) + (call.Lambda.rows == 1 ? 0 : sequence * row) + at;
  }
  T* of(const View& view, int64_t sequence) const {
    return view ? static_cast<T*>(view.data) + sequence * row + at : nullptr;
  }

  void forward(const T* input, int64_t sequence) const {
    const T *u = first(input, sequence), *before = of(call.initial, sequence), *factors = Lambda(sequence);
    T* h = first(static_cast<T*>(call.states.data), sequence);
    for (int64_t t = 0; t < call.steps; t += chunk) {
      const int64_t steps = min(chunk, call.steps - t);
      for_blocks<T>(count, [&](auto block) { run(block, factors, before, u + t * stride, h + t * stride, steps); });
      before = h + (t + steps - 1) * stride;
    }
  }

  template <int held, bool full>
  void run(Block<T, held, full> block, const T* factors, const T* before, const T* u, T* h, int64_t steps) const {
    Vector<T> state[held];
    for (int v = 0; v < held; ++v) state[v] = before ? block.read(before, v) : Vector<T>{};
    const Factors<T, is_complex, held> L(block, factors, false);
    int64_t t = 0;
    if (!before) {  // h_1 is u_1 itself, also where λ is not finite
      for (int v = 0; v < held; ++v) block.write(h, v, state[v] = block.read(u, v));
      t = 1;
    }
    for (; t < steps; ++t)
      for (int v = 0; v < held; ++v)
        block.write(h + t * stride, v, state[v] = L.of[v].times_plus(state[v], block.read(u + t * stride, v)));
  }

  // The gradients of one sequence; `total` (count) gains its part of ∂λ.
  void backward(const T* grad, const LinearRecurrenceGradients& to, int64_t sequence, double* total) const {
    const T *incoming = first(grad, sequence), *h = first(static_cast<const T*>(call.states.data), sequence);
    const T *initial = of(call.initial, sequence), *factors = Lambda(sequence);
    T* g = first(static_cast<T*>(to.input.data), sequence);
    T* start = of(to.initial, sequence);
    for (int64_t end = call.steps; end > 0;) {
      const int64_t begin = max<int64_t>(0, end - chunk);
      for_blocks<T>(count, [&](auto block) {
        turn_back(block, factors, incoming, h, initial, g, begin, end, total);
        if (start && begin == 0) reach_start(block, factors, g, start);
      });
      end = begin;
    }
    if (start && call.steps == 0)
      for (int64_t l = 0; l < count; ++l) start[l] = 0;
  }

  template <int held, bool full>
  void turn_back(Block<T, held, full> block, const T* factors, const T* incoming, const T* h, const T* initial, T* g,
                 int64_t begin, int64_t end, double* total) const {
    const Factors<T, is_complex, held> L(block, factors, true);
    Vector<T> state[held];
    Sum<T, is_complex> sum[held];
    const bool last = end == call.steps;
    for (int v = 0; v < held; ++v) state[v] = last ? Vector<T>{} : block.read(g + end * stride, v);
    for (int64_t t = end - 1; t >= begin; --t) {
      const T* before = t > 0 ? h + (t - 1) * stride : initial;
      for (int v = 0; v < held; ++v) {
        const Vector<T> arrived = block.read(incoming + t * stride, v);
        state[v] = last && t == end - 1 ? arrived : L.of[v].times_plus(state[v], arrived);
        block.write(g + t * stride, v, state[v]);
        if (total && before) sum[v].add(state[v], block.read(before, v));
      }
    }
    if (total)
      for (int v = 0; v < held; ++v) sum[v].move_to(total + block.at + v * kLanes<T>, block.count(v));
  }

  template <int held, bool full>
  void reach_start(Block<T, held, full> block, const T* factors, const T* g, T* start) const {
    const Factors<T, is_complex, held> L(block, factors, true);
    for (int v = 0; v < held; ++v) block.write(start, v, L.of[v].times_plus(block.read(g, v), Vector<T>{}));
  }
};

// States and sequences to tasks: f(share, first sequence, last, index of the group of sequences).
template <class T, bool is_complex, class F>
void for_shares(const LinearRecurrence& call, int64_t group, int threads, const F& f) {
  const int64_t N = call.states.rows, row = call.order * (is_complex ? 2 : 1);
  if (!N) return;
  const int64_t groups = ceil_div(N, group), least = kLeast / int64_t(sizeof(T));
  threads = useful_threads(threads, N * (call.steps + 1) * row * 4);
  // as many parts of a row as keep all threads at work; no result depends on it
  const int64_t wanted = threads == 1 ? 1 : max<int64_t>(1, ceil_div(4 * threads, groups));
  const int64_t span = max(least, round_up(ceil_div(row, wanted), least)), spans = ceil_div(row, span);
  parallel_for(threads, groups * spans, [&](int64_t task, int) {
    const int64_t index = task / spans, at = task % spans * span;
    f(Share<T, is_complex>{call, at, min(span, row - at)}, index * group, min(N, (index + 1) * group), index);
  });
}

template <class F>
void with_number(const LinearRecurrence& call, const F& f) {
  if (!call.order) return;
  const auto by_kind = [&]<class T>(T*) {
    call.is_complex ? f.template operator()<T, true>() : f.template operator()<T, false>();
  };
  call.states.dtype == DType::float64 ? by_kind(static_cast<double*>(nullptr)) : by_kind(static_cast<float*>(nullptr));
}

void forward(const LinearRecurrence& call, const View& input, int threads) {
  with_number(call, [&]<class T, bool is_complex>() {
    for_shares<T, is_complex>(call, 1, threads, [&](const auto& share, int64_t begin, int64_t end, int64_t) {
      for (int64_t i = begin; i < end; ++i) share.forward(static_cast<const T*>(input.data), i);
    });
  });
}

void backward(const LinearRecurrence& call, const View& grad, const LinearRecurrenceGradients& to, int threads) {
  with_number(call, [&]<class T, bool is_complex>() {
    const int64_t row = call.order * (is_complex ? 2 : 1), N = call.states.rows;
    const bool shared = call.Lambda.rows == 1;
    const int64_t group = shared ? max<int64_t>(1, ceil_div(N, kPartials)) : 1, groups = ceil_div(N, group);
    Buffer<double> totals(to.Lambda ? groups * row : 0);
    for_shares<T, is_complex>(call, group, threads, [&](const auto& share, int64_t begin, int64_t end, int64_t index) {
      double* total = to.Lambda ? totals.get() + index * row + share.at : nullptr;
      for (int64_t l = 0; total && l < share.count; ++l) total[l] = 0;
      for (int64_t i = begin; i < end; ++i) share.backward(static_cast<const T*>(grad.data), to, i, total);
    });
    if (!to.Lambda) return;
    T* found = static_cast<T*>(to.Lambda.data);
    for (int64_t l = 0; shared && l < row; ++l) {
      double sum = 0;
      for (int64_t i = 0; i < groups; ++i) sum += totals[i * row + l];
      found[l] = static_cast<T>(sum);
    }
    for (int64_t l = 0; !shared && l < groups * row; ++l) found[l] = static_cast<T>(totals[l]);
  });
}

}  // namespace

extern const LinearRecurrenceKernels linear_recurrence;
const LinearRecurrenceKernels linear_recurrence{&forward, &backward};

}  // namespace kd::KD_ISA
