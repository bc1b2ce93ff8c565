// Hankel singular values of many diagonal systems: a team of threads for each Gramian's factor, then one for each
// system's SVD of L_oᴴ L_c.
#include "jacobi.cuh"
#include "kdkernels/cuda.h"

namespace kd {
namespace {

// One Gramian: P_ij = b_i b_jᴴ / (1 − λ_i λ_j*). The observability Gramian is that of (Λ*, Cᴴ).
template <typename T>
struct Side {
  const T* generator;  // (batch, n, m), or (batch, m, n) if it is C
  int m;
  T* factor;          // (batch, n, n)
  Real<T>* residual;  // (batch, n + 1), or null
};

template <typename T>
struct Generator {
  using R = Real<T>;
  T *b, *lambda;  // n × m, n
  R *norm, *den;  // ‖b_i‖², 1 − |λ_i|²
  R* scores;      // 2 × n: ‖b_i‖² / (1 − |λ_i|²) of this column and of the next; −1 once the row was a pivot
  R* scratch;

  __device__ Generator(unsigned char* memory, int n, int m) {
    b = reinterpret_cast<T*>(memory);
    lambda = b + n * m;
    norm = reinterpret_cast<R*>(lambda + n);
    den = norm + n;
    scores = den + n;
    scratch = scores + 2 * n;
  }

  static int64_t bytes(int64_t n, int64_t m) {
    return ((n * m + n) * sizeof(T) + (4 * n + kMaxWarps) * sizeof(R) + 15) / 16 * 16;
  }
};

// The largest score and where it is (the first of equals), and the sum of those that are left. Every warp for itself.
template <typename R>
struct Pivot {
  R largest = -1, remaining = 0;
  int row = 0;

  __device__ Pivot(const R* score, int n) {
    for (int i = static_cast<int>(threadIdx.x) % kWarpSize; i < n; i += kWarpSize) {
      if (score[i] > largest) largest = score[i], row = i;
      remaining += fmax(score[i], R(0));
    }
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      const R other = __shfl_xor_sync(kWarpMask, largest, offset);
      const int its_row = __shfl_xor_sync(kWarpMask, row, offset);
      remaining += __shfl_xor_sync(kWarpMask, remaining, offset);
      if (other > largest || (other == largest && its_row < row)) largest = other, row = its_row;
    }
  }
};

// Generator Cholesky with pivots: column k of the factor and the next generator, for k = 0, 1, …
template <typename T>
__device__ void factorise(const Team& team, const Generator<T>& g, int n, int m, Real<T> scale, T* factor,
                          Real<T>* residual) {
  using R = Real<T>;
  for (int k = 0; k < n; ++k) {
    const R* score = g.scores + (k & 1) * n;
    R* next = g.scores + (~k & 1) * n;
    const Pivot<R> pivot(score, n);
    const int q = pivot.row;
    const bool any = pivot.largest > R(0);  // else the rest is exactly zero
    if (residual && team.rank == 0) residual[k] = pivot.remaining * scale * scale;
    const T lambda_q = g.lambda[q];
    const T* b_q = g.b + q * m;
    for (int i = team.group; i < team.rounds(n); i += team.groups) {
      const bool left = any && i < n && score[i] >= R(0) && i != q;
      T* b = g.b + (i < n ? i : 0) * m;
      T dot = number<T>(R(0));
      for (int j = team.lane; left && j < m; j += team.width) dot = dot + b[j] * conj(b_q[j]);
      dot = team.sum(dot);
      R norm = 0;
      T entry = number<T>(any && i == q ? sqrt(pivot.largest) * scale : R(0));
      if (left) {
        // 1 − λ_i λ_q* = 1 − |λ_q|² − (λ_i − λ_q) λ_q*, where neither term is larger than twice the whole
        const T apart = g.lambda[i] - lambda_q;
        const T over = inverse(number<T>(g.den[q]) - apart * conj(lambda_q));
        const T phi = apart * over;
        entry = dot * over * (R(1) / sqrt(pivot.largest) * scale);
        const T weight = dot * (R(1) / g.norm[q]);  // b_i ← (b_i − w b_q) + φ w b_q
        for (int j = team.lane; j < m; j += team.width) {
          const T along = weight * b_q[j];
          b[j] = m == 1 ? phi * b[j] : (b[j] - along) + phi * along;
          norm += abs2(b[j]);
        }
      }
      norm = team.sum(norm);
      if (i < n && team.lane == 0) {
        factor[i * n + k] = entry;
        if (left) g.norm[i] = norm;
        next[i] = left ? norm / g.den[i] : any ? R(-1) : score[i];
      }
    }
    team.sync();
  }
  if (residual && team.rank == 0) residual[n] = R(0);
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads<T>, 1)
    factor_kernel(const T* Lambda, Side<T> controllability, Side<T> observability, int64_t batch, int n,
                  unsigned char* workspace, int64_t bytes, int threads, int width) {
  using R = Real<T>;
  const Team team(threads, width);
  unsigned char* memory = workspace ? workspace + team.index * bytes : dynamic_shared() + team.in_block * bytes;
  for (int64_t job = team.index; job < 2 * batch; job += team.systems) {
    const int64_t system = job / 2;
    // field by field: a parameter whose address is taken is copied to local memory
    const bool of_c = job % 2 != 0;
    const int m = of_c ? observability.m : controllability.m, other_m = of_c ? controllability.m : observability.m;
    const T* generator = of_c ? observability.generator : controllability.generator;
    const T* other_generator = of_c ? controllability.generator : observability.generator;
    const Generator<T> g(memory, n, m);
    const int size = n * m, other_size = n * other_m;
    R largest = 0;
    bool bad = false;
    for (int i = team.rank; i < n; i += team.threads) {
      const T lambda = Lambda[system * n + i];
      g.lambda[i] = of_c ? conj(lambda) : lambda;
      g.den[i] = one_minus_abs2(lambda);
      bad |= !finite(lambda) || !(g.den[i] > R(0));
    }
    for (int e = team.rank; e < size; e += team.threads) {
      const T x = generator[system * size + e];
      largest = fmax(largest, largest_part(x));
      bad |= !finite(x);
    }
    for (int e = team.rank; e < other_size; e += team.threads) bad |= !finite(other_generator[system * other_size + e]);
    T* factor = (of_c ? observability.factor : controllability.factor) + system * n * n;
    R* residual = of_c ? observability.residual : controllability.residual;
    if (residual) residual += system * (n + 1);
    if (team.any(bad)) {
      for (int e = team.rank; e < n * n; e += team.threads) factor[e] = not_a_number<T>();
      for (int k = team.rank; residual && k <= n; k += team.threads) residual[k] = not_a_number<R>();
      continue;
    }
    const Scale<R> scale(team.max_of_team(largest, g.scratch));
    for (int e = team.rank; e < size; e += team.threads) {
      const T x = generator[system * size + e] * scale.down;
      of_c ? g.b[e % n * m + e / n] = conj(x) : g.b[e] = x;
    }
    team.sync();
    for (int i = team.rank; i < n; i += team.threads) {
      R norm = 0;
      for (int j = 0; j < m; ++j) norm += abs2(g.b[i * m + j]);
      g.norm[i] = norm;
      g.scores[i] = norm / g.den[i];
    }
    team.sync();
    factorise(team, g, n, m, scale.up, factor, residual);
    team.sync();
  }
}

template <typename T, bool in_registers>
__global__ void __launch_bounds__(kMaxThreads<T>, 1)
    hankel_kernel(const T* factor_c, const T* factor_o, int64_t batch, int n, Real<T>* values, T* right, T* left,
                  unsigned char* workspace, int64_t bytes, int threads, int width) {
  using R = Real<T>;
  const Team team(threads, width);
  const bool vectors = right != nullptr;
  const Svd<T> s(team_memory<in_registers>(team, workspace, bytes), n, n, vectors);
  const int square = n * n;
  for (int64_t system = team.index; system < batch; system += team.systems) {
    const T *L_c = factor_c + system * square, *L_o = factor_o + system * square;
    for (int e = team.rank; e < square; e += team.threads) {
      T dot = number<T>(R(0));
      for (int r = 0; r < n; ++r) dot = dot + conj(L_o[r * n + e / n]) * L_c[r * n + e % n];
      s.column_a(e % n)[e / n] = dot;
    }
    team.sync();
    const R scale = normalise_matrix(team, s);
    if (isfinite(scale)) svd<T, in_registers>(team, s);  // columns fall already: no permutation
    for (int k = team.rank; values && k < n; k += team.threads) {
      const int to = isfinite(scale) ? s.place[k] : k;
      values[system * n + to] = isfinite(scale) ? s.sigma[k] * scale : scale;
    }
    for (int e = team.rank; vectors && e < square; e += team.threads) {
      const int i = e / n, k = e % n;
      const int64_t to = system * square + i * n + (isfinite(scale) ? s.place[k] : k);
      T t = isfinite(scale) ? number<T>(R(0)) : not_a_number<T>(), w = t;
      if (isfinite(scale) && s.sigma[k] > R(0)) {
        for (int r = 0; r < n; ++r) {
          t = t + L_c[i * n + r] * s.column_x(k)[r];
          w = w + L_o[i * n + r] * s.column_k(k)[r];
        }
        const R over = R(1) / (sqrt(s.sigma[k]) * sqrt(scale));
        t = t * over, w = w * over;
      }
      right[to] = t;
      left[to] = w;
    }
    team.sync();
  }
}

// Systems that are in the workspace at once, if their factors are not among the results.
constexpr int64_t kChunk = 8192;

template <typename T>
struct Plan {
  TeamShape shape;  // of the factors
  bool in_shared;
  int64_t bytes, factor_blocks, chunk;
  SvdLaunch svd;
  int64_t factors_at, svd_at, end;  // offsets in the workspace, which begins with the generators

  explicit Plan(const CudaHankel& call) {
    const int64_t n = call.n, m = call.m > call.p ? call.m : call.p;
    chunk = call.batch < kChunk ? call.batch : kChunk;
    shape = team_shape<T>(n, m, 1);
    bytes = Generator<T>::bytes(n, m);
    const int64_t limit = static_cast<int64_t>(shared_limit());
    in_shared = bytes <= limit;
    if (in_shared) shape.fit(bytes, limit);
    factor_blocks = blocks_for(2 * chunk, shape, in_shared ? 2 * chunk : kResidentBlocks);
    svd = SvdLaunch::plan<T>(chunk, n, n, call.T != nullptr);
    const auto aligned = [](int64_t size) { return (size + 15) / 16 * 16; };
    const int64_t factor = aligned(chunk * n * n * static_cast<int64_t>(sizeof(T)));
    factors_at = in_shared ? 0 : factor_blocks * shape.teams * bytes;
    svd_at = factors_at + factor * (!call.factor_c + !call.factor_o);
    end = svd_at + (call.values || call.T ? svd.workspace() : 0);
  }
};

template <typename T>
void run(const CudaHankel& call, void* workspace, void* stream) {
  using R = Real<T>;
  const Plan<T> plan(call);
  const int64_t n = call.n;
  auto* memory = static_cast<unsigned char*>(workspace);
  const auto at = [](auto* array, int64_t offset) { return array ? array + offset : nullptr; };
  for (int64_t first = 0; first < call.batch; first += plan.chunk) {
    const int64_t count = call.batch - first < plan.chunk ? call.batch - first : plan.chunk;
    T* spare = reinterpret_cast<T*>(memory + plan.factors_at);
    T* factor_c = call.factor_c ? static_cast<T*>(call.factor_c) + first * n * n : spare;
    if (!call.factor_c) spare += plan.chunk * n * n;
    T* factor_o = call.factor_o ? static_cast<T*>(call.factor_o) + first * n * n : spare;
    const Side<T> controllability{static_cast<const T*>(call.B) + first * n * call.m, static_cast<int>(call.m),
                                  factor_c, at(static_cast<R*>(call.residual_c), first * (n + 1))};
    const Side<T> observability{static_cast<const T*>(call.C) + first * n * call.p, static_cast<int>(call.p), factor_o,
                                at(static_cast<R*>(call.residual_o), first * (n + 1))};
    const size_t shared = plan.in_shared ? static_cast<size_t>(plan.shape.teams * plan.bytes) : 0;
    launch(factor_kernel<T>, {plan.factor_blocks, plan.shape.block(), shared, stream},
           static_cast<const T*>(call.Lambda) + first * n, controllability, observability, count, static_cast<int>(n),
           plan.in_shared ? nullptr : memory, plan.bytes, plan.shape.threads, plan.shape.width);
    if (!call.values && !call.T) continue;
    launch(plan.svd.in_registers ? hankel_kernel<T, true> : hankel_kernel<T, false>, plan.svd.where(stream), factor_c,
           factor_o, count, static_cast<int>(n), at(static_cast<R*>(call.values), first * n),
           at(static_cast<T*>(call.T), first * n * n), at(static_cast<T*>(call.W), first * n * n), memory + plan.svd_at,
           plan.svd.bytes, plan.svd.shape.threads, plan.svd.shape.width);
  }
}

}  // namespace

int64_t cuda_hankel_workspace(const CudaHankel& call) {
  if (call.batch == 0 || call.n == 0) return 0;
  return with_number(call, [&](auto zero) { return Plan<decltype(zero)>(call).end; });
}

void cuda_hankel(const CudaHankel& call, void* workspace, void* stream) {
  if (call.batch == 0 || call.n == 0) return;
  with_number(call, [&](auto zero) { run<decltype(zero)>(call, workspace, stream); });
}

}  // namespace kd
