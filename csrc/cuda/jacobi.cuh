// The SVD of one small matrix by its team of threads, rows ≥ n:
//
//   A P = Q R     Householder, columns by falling norm. If the rows fall too, every row keeps its own accuracy.
//   X = Rᴴ        then X J = V̂ Σ by one-sided Jacobi, so A = (Q J) Σ (P V̂)ᴴ      (Drmač & Veselić 2008)
//
// Column k of X is stored as x̃_k with |x̃_k| = 1 at the start of a sweep, and its scale d_k beside it: columns may lie
// 24 decades apart in float32, whose squares hold 38. For a pair d_x |x̃| ≥ d_y |ỹ|, with
//
//   α = |x̃|²  β = |ỹ|²  g = x̃ᴴỹ  γ = |g|  e = g/γ  r = d_y/d_x  δ = α − r²β  τ = 2γ / (δ + √(δ² + 4r²γ²))
//   x̃ ← c (x̃ + r²τ ē ỹ)      ỹ ← c (ỹ − τ e x̃)      c = 1/√(1 + r²τ²)
//
// J is stored as K = J D⁻¹, which turns with the same coefficients; K begins as D⁻¹.
#pragma once

#include "team.cuh"

namespace kd {

constexpr int kHeld = 4;  // elements of a column that a lane holds in registers, where matrices are in shared memory
constexpr int kMaxSweeps = 30;

// Where one system lives: shared memory, or a workspace. Columns are contiguous, `stride` apart.
template <typename T>
struct Svd {
  using R = Real<T>;
  int rows, n;
  int stride_a, stride_x;  // odd: columns start in different banks
  T* a;                    // rows × n: A P, then R above the diagonal and Householder vectors from it down
  T* x;                    // n × n: X, then V̂ Σ. Without vectors it lies in a.
  T* k;                    // rows × n, if vectors are wanted: K, then U
  R *d, *sigma, *nu;       // scales; singular values; norms of the Householder vectors
  R* scratch;              // one a warp
  int *source, *place;     // P; and where column k stands among falling singular values
  bool vectors;

  __host__ __device__ Svd(unsigned char* memory, int rows_, int n_, bool vectors_)
      : rows(rows_), n(n_), stride_a(rows_ | 1), stride_x(vectors_ ? n_ | 1 : rows_ | 1), vectors(vectors_) {
    a = reinterpret_cast<T*>(memory);
    x = vectors ? a + stride_a * n : a;
    k = x + stride_x * n;
    d = reinterpret_cast<R*>(vectors ? k + stride_a * n : k);
    sigma = d + n;
    nu = sigma + n;
    scratch = nu + n;
    source = reinterpret_cast<int*>(scratch + kMaxWarps);
    place = source + n;
  }

  static int64_t bytes(int64_t rows, int64_t n, bool vectors) {
    const int64_t matrices = (rows | 1) * n * (vectors ? 2 : 1) + (vectors ? (n | 1) * n : 0);
    const int64_t reals = 3 * n + kMaxWarps, integers = 2 * n;
    return (matrices * sizeof(T) + reals * sizeof(R) + integers * sizeof(int) + 15) / 16 * 16;
  }

  __device__ T* column_a(int j) const { return a + j * stride_a; }
  __device__ T* column_x(int j) const { return x + j * stride_x; }
  __device__ T* column_k(int j) const { return k + j * stride_a; }
};

// place[k]: how many columns come before column k when `size` falls, equals keeping their order.
template <typename R>
__device__ void rank_falling(const Team& team, const R* size, int n, int* place) {
  for (int k = team.rank; k < n; k += team.threads) {
    int before = 0;
    for (int j = 0; j < n; ++j) before += size[j] > size[k] || (size[j] == size[k] && j < k);
    place[k] = before;
  }
}

// The Householder vector that column k defines: v = x/ν with its phase added at the top, H = I − v vᴴ / (1 + |x_k|/ν),
// H x = −phase ν e_k. A column keeps its x, so that all groups may read it at once.
template <typename T>
struct Reflector {
  using R = Real<T>;
  const T* x;
  int k, end;
  R down, beta;
  T phase;

  __device__ Reflector(const T* x_, int k_, int end_, R nu) : x(x_), k(k_), end(end_) {
    const R top = magnitude(x[k] * (R(1) / nu));
    down = R(1) / nu;
    beta = R(1) / (R(1) + top);
    const bool negligible = top < sqrt(Limits<R>::tiny / Limits<R>::epsilon);  // its square may have no digits
    phase = negligible ? number<T>(R(1)) : x[k] * down * (R(1) / top);
  }

  __device__ __forceinline__ T operator[](int i) const { return i == k ? x[i] * down + phase : x[i] * down; }

  // y ← H y, by one group
  __device__ void apply(const Team& team, T* y, bool mine) const {
    T dot = number<T>(R(0));
    if (mine)
      for (int i = team.first(k); i < end; i += team.width) dot = dot + conj((*this)[i]) * y[i];
    dot = team.sum(dot) * beta;
    if (mine)
      for (int i = team.first(k); i < end; i += team.width) y[i] = y[i] - (*this)[i] * dot;
  }
};

// a = A P becomes R and the Householder vectors.
template <typename T>
__device__ void qr(const Team& team, const Svd<T>& s) {
  for (int k = 0; k < s.n; ++k) {
    const Real<T> nu = safe_norm(team, s.column_a(k), k, s.rows);
    if (team.rank == 0) s.nu[k] = nu;
    if (nu > 0) {
      const Reflector<T> reflector(s.column_a(k), k, s.rows, nu);
      for (int j = k + 1 + team.group; j < k + 1 + team.rounds(s.n - k - 1); j += team.groups)
        reflector.apply(team, s.column_a(j), j < s.n);
    }
    team.sync();
  }
}

// x = Rᴴ, its columns scaled to norm 1; K = D⁻¹.
template <typename T>
__device__ void transpose(const Team& team, const Svd<T>& s) {
  using R = Real<T>;
  for (int e = team.rank; e < s.n * s.n; e += team.threads) {
    const int k = e / s.n, j = e % s.n;
    if (j < k) continue;
    T r = s.column_a(j)[k];
    if (j == k) r = s.nu[k] > 0 ? Reflector<T>(s.column_a(k), k, s.rows, s.nu[k]).phase * -s.nu[k] : number<T>(R(0));
    if (j > k) s.column_x(j)[k] = number<T>(R(0));
    s.column_x(k)[j] = conj(r);
  }
  if (s.vectors)
    for (int e = team.rank; e < s.rows * s.n; e += team.threads) s.column_k(e / s.rows)[e % s.rows] = number<T>(R(0));
  team.sync();
}

// Columns back to norm 1; σ_k = d_k |x̃_k|. A column of which one sweep leaves only rounding errors lies in the span of
// the others: it becomes zero, or it would shrink at every sweep, never orthogonal. It keeps its scale.
template <typename T>
__device__ void normalise(const Team& team, const Svd<T>& s, bool first) {
  using R = Real<T>;
  for (int k = team.group; k < team.rounds(s.n); k += team.groups) {
    const bool mine = k < s.n;
    T* x = s.column_x(mine ? k : 0);
    R norm = safe_norm(team, x, 0, mine ? s.n : 0);
    if (!first && norm < R(4) * Limits<R>::epsilon) norm = R(0);
    const R scale = norm > R(0) ? R(1) / norm : R(0), d = first || !mine ? R(1) : s.d[k];
    const R next = norm > R(0) ? d * norm : d;
    for (int i = team.lane; mine && i < s.n; i += team.width) {
      x[i] = x[i] * scale;
      if (s.vectors && !first) s.column_k(k)[i] = s.column_k(k)[i] * (norm > R(0) ? scale : R(1));
    }
    __syncwarp();  // all lanes have read d
    if (mine && team.lane == 0) {
      s.d[k] = next;
      s.sigma[k] = norm > R(0) ? next : R(0);
      if (s.vectors && first) s.column_k(k)[k] = number<T>(R(1) / next);
    }
  }
  team.sync();
}

template <typename T>
struct Rotation {
  T on_x, on_y;  // x̃ ← c x̃ + on_x ỹ, ỹ ← c ỹ − on_y x̃
  Real<T> lost;  // 1 − c, which keeps the digits that c would round away, rotation after rotation
  bool wanted;

  __device__ Rotation(Real<T> alpha, Real<T> beta, T g, Real<T> d_x, Real<T> d_y, Real<T> tolerance) {
    using R = Real<T>;
    const R gamma = magnitude(g);
    wanted = gamma > tolerance * sqrt(alpha) * sqrt(beta);
    if (!wanted) return;
    const R r = d_y / d_x, r2 = r * r;
    const R delta = fmax(alpha - r2 * beta, R(0)), h = R(2) * r * gamma;
    const R tau = R(2) * gamma / (delta + sqrt(delta * delta + h * h));
    const R t = r * tau;
    const R root = sqrt(R(1) + t * t), c = R(1) / root;
    lost = t * t * c / (R(1) + root);
    const T e = g * (c * tau / gamma);
    on_x = conj(e) * r2;
    on_y = e;
  }

  __device__ __forceinline__ void apply(T& x, T& y) const {
    const T old = x;
    x = x + (on_x * y - x * lost);
    y = y - (on_y * old + y * lost);
  }
};

// Makes columns p and q of X orthogonal, by one group; true if they were not.
template <typename T, bool in_registers>
__device__ bool rotate(const Team& team, const Svd<T>& s, int p, int q, bool mine, Real<T> tolerance) {
  using R = Real<T>;
  T *x = s.column_x(p), *y = s.column_x(q);
  const int n = mine ? s.n : 0;
  R alpha = 0, beta = 0;
  T g = number<T>(R(0));
  T held_x[kHeld], held_y[kHeld];
  const auto add = [&](T xi, T yi) {
    alpha += abs2(xi);
    beta += abs2(yi);
    g = g + conj(xi) * yi;
  };
  if constexpr (in_registers) {
    for (int e = 0; e < kHeld; ++e) {
      const int i = team.lane + e * team.width;
      held_x[e] = i < n ? x[i] : number<T>(R(0));
      held_y[e] = i < n ? y[i] : number<T>(R(0));
      add(held_x[e], held_y[e]);
    }
  } else {
    for (int i = team.lane; i < n; i += team.width) add(x[i], y[i]);
  }
  alpha = team.sum(alpha), beta = team.sum(beta), g = team.sum(g);
  if (!mine) return false;

  const R d_p = s.d[p], d_q = s.d[q];
  const bool swapped = d_p * sqrt(alpha) < d_q * sqrt(beta);
  const Rotation<T> rotation = swapped ? Rotation<T>(beta, alpha, conj(g), d_q, d_p, tolerance)
                                       : Rotation<T>(alpha, beta, g, d_p, d_q, tolerance);
  if (!rotation.wanted) return false;
  const auto turn = [&](T& xi, T& yi) { swapped ? rotation.apply(yi, xi) : rotation.apply(xi, yi); };
  if constexpr (in_registers) {
    for (int e = 0; e < kHeld; ++e) {
      const int i = team.lane + e * team.width;
      turn(held_x[e], held_y[e]);
      if (i < n) x[i] = held_x[e], y[i] = held_y[e];
    }
  } else {
    for (int i = team.lane; i < n; i += team.width) turn(x[i], y[i]);
  }
  if (s.vectors) {
    T *kx = s.column_k(p), *ky = s.column_k(q);
    for (int i = team.lane; i < n; i += team.width) turn(kx[i], ky[i]);
  }
  return true;
}

// Sweeps over all pairs, n/2 of them at a time: in a round-robin tournament every column meets every other once.
template <typename T, bool in_registers>
__device__ void jacobi(const Team& team, const Svd<T>& s) {
  using R = Real<T>;
  const R tolerance = Limits<R>::epsilon * fmax(R(2), sqrt(R(s.n)));
  const int players = s.n + (s.n & 1), rounds = players - 1, pairs = players / 2;
  for (int sweep = 0; sweep < kMaxSweeps && s.n > 1; ++sweep) {
    bool rotated = false;
    for (int round = 0; round < rounds; ++round) {
      for (int pair = team.group; pair < team.rounds(pairs); pair += team.groups) {
        int p = round + pair, q = pair == 0 ? players - 1 : round - pair;
        if (p >= rounds) p -= rounds;
        if (q < 0) q += rounds;
        const bool mine = pair < pairs && p < s.n && q < s.n;  // an odd one sits out
        rotated |= rotate<T, in_registers>(team, s, mine ? p : 0, mine ? q : 0, mine, tolerance);
      }
      team.sync();
    }
    if (!team.any(rotated)) break;
    normalise(team, s, false);
  }
}

// K becomes U = Q J.
template <typename T>
__device__ void left_vectors(const Team& team, const Svd<T>& s) {
  using R = Real<T>;
  for (int c = team.group; c < team.rounds(s.n); c += team.groups) {
    const bool mine = c < s.n;
    T* u = s.column_k(mine ? c : 0);
    if (mine)
      for (int i = team.lane; i < s.n; i += team.width) u[i] = u[i] * s.d[c];
    for (int k = s.n - 1; k >= 0; --k)
      if (s.nu[k] > 0) Reflector<T>(s.column_a(k), k, s.rows, s.nu[k]).apply(team, u, mine);
    const R norm = safe_norm(team, u, 0, mine ? s.rows : 0);
    if (mine)
      for (int i = team.lane; i < s.rows; i += team.width) u[i] = u[i] * (R(1) / norm);
  }
}

// s.a holds A on entry, with a sync behind it. On return x has the columns of V̂ (zero for σ = 0), K those of U, sigma
// the values and place their order; V is V̂ with row k moved to row source[k].
template <typename T, bool in_registers>
__device__ void svd(const Team& team, const Svd<T>& s) {
  qr(team, s);
  transpose(team, s);
  normalise(team, s, true);
  jacobi<T, in_registers>(team, s);
  rank_falling(team, s.sigma, s.n, s.place);
  if (s.vectors) left_vectors(team, s);
  team.sync();
}

// A's own size taken out of it, exactly; NaN for a matrix that is not finite.
template <typename T>
__device__ Real<T> normalise_matrix(const Team& team, const Svd<T>& s) {
  using R = Real<T>;
  R largest = 0;
  bool bad = false;
  for (int e = team.rank; e < s.rows * s.n; e += team.threads) {
    const T x = s.column_a(e / s.rows)[e % s.rows];
    bad |= !finite(x);
    largest = fmax(largest, largest_part(x));
  }
  if (team.any(bad)) return not_a_number<R>();
  const Scale<R> scale(team.max_of_team(largest, s.scratch));
  for (int e = team.rank; e < s.rows * s.n; e += team.threads) {
    T& x = s.column_a(e / s.rows)[e % s.rows];
    x = x * scale.down;
  }
  team.sync();
  return scale.up;
}

// How to launch a kernel that has one Svd a team.
struct SvdLaunch {
  bool in_registers;  // and in shared memory, else in a workspace
  TeamShape shape;
  int64_t bytes, blocks;

  template <typename T>
  static SvdLaunch plan(int64_t batch, int64_t rows, int64_t n, bool vectors) {
    SvdLaunch plan;
    plan.shape = team_shape<T>((n + 1) / 2, n, kHeld);
    plan.bytes = Svd<T>::bytes(rows, n, vectors);
    const int64_t limit = static_cast<int64_t>(shared_limit());
    plan.in_registers = n <= kHeld * plan.shape.width && plan.bytes <= limit;
    if (plan.in_registers) plan.shape.fit(plan.bytes, limit);
    plan.blocks = blocks_for(batch, plan.shape, plan.in_registers ? batch : kResidentBlocks);
    return plan;
  }

  int64_t workspace() const { return in_registers ? 0 : blocks * shape.teams * bytes; }
  Launch where(void* stream) const {
    return {blocks, shape.block(), static_cast<size_t>(in_registers ? shape.teams * bytes : 0), stream};
  }
};

template <bool in_registers>
__device__ __forceinline__ unsigned char* team_memory(const Team& team, unsigned char* workspace, int64_t bytes) {
  if constexpr (in_registers)
    return dynamic_shared() + team.in_block * bytes;
  else
    return workspace + team.index * bytes;
}

}  // namespace kd
