// Singular values, or all of A = U Σ Vᴴ, of many small matrices: a team of threads for each.
#include "jacobi.cuh"
#include "kdkernels/cuda.h"

namespace kd {
namespace {

// Columns of V̂ whose σ is zero become unit vectors orthogonal to the others: each time the axis that is farthest from
// the others' span, less its projection, twice (Kahan: twice is enough). Rare, so threads take turns simply.
template <typename T>
__device__ void complete(const Team& team, const Svd<T>& s) {
  using R = Real<T>;
  for (int k = 0; k < s.n; ++k) {
    if (s.sigma[k] > R(0)) continue;
    const auto valid = [&](int j) { return s.sigma[j] > R(0) || j < k; };
    for (int i = team.rank; i < s.n; i += team.threads) {
      R covered = 0;
      for (int j = 0; j < s.n; ++j)
        if (valid(j)) covered += abs2(s.column_x(j)[i]);
      s.nu[i] = covered;
    }
    team.sync();
    int axis = 0;
    for (int i = 1; i < s.n; ++i)
      if (s.nu[i] < s.nu[axis]) axis = i;
    for (int i = team.rank; i < s.n; i += team.threads) s.column_x(k)[i] = number<T>(i == axis ? R(1) : R(0));
    team.sync();
    for (int time = 0; time < 2; ++time) {
      // the projections, in A's place: it is done with
      for (int j = team.rank; j < s.n; j += team.threads) {
        T dot = number<T>(R(0));
        for (int i = 0; valid(j) && i < s.n; ++i) dot = dot + conj(s.column_x(j)[i]) * s.column_x(k)[i];
        s.column_a(0)[j] = dot;
      }
      team.sync();
      for (int i = team.rank; i < s.n; i += team.threads) {
        T left = s.column_x(k)[i];
        for (int j = 0; j < s.n; ++j)
          if (valid(j)) left = left - s.column_x(j)[i] * s.column_a(0)[j];
        s.column_x(k)[i] = left;
      }
      team.sync();
    }
    R squares = 0;
    for (int i = 0; i < s.n; ++i) squares += abs2(s.column_x(k)[i]);
    team.sync();
    for (int i = team.rank; i < s.n; i += team.threads) s.column_x(k)[i] = s.column_x(k)[i] * (R(1) / sqrt(squares));
    team.sync();
  }
}

template <typename T, bool in_registers>
__global__ void __launch_bounds__(kMaxThreads<T>, 1)
    svd_kernel(const T* matrices, int64_t batch, int rows, int n, Real<T>* values, T* left, T* right,
               unsigned char* workspace, int64_t bytes, int threads, int width) {
  using R = Real<T>;
  const Team team(threads, width);
  const bool vectors = left != nullptr;
  const Svd<T> s(team_memory<in_registers>(team, workspace, bytes), rows, n, vectors);
  const int size = rows * n, square = n * n;
  for (int64_t system = team.index; system < batch; system += team.systems) {
    const T* matrix = matrices + system * size;
    for (int e = team.rank; e < size; e += team.threads) s.column_a(e % n)[e / n] = matrix[e];
    team.sync();
    const R scale = normalise_matrix(team, s);
    if (isfinite(scale)) {
      for (int k = team.group; k < team.rounds(n); k += team.groups) {
        const R norm = safe_norm(team, s.column_a(k < n ? k : 0), 0, k < n ? rows : 0);
        if (k < n && team.lane == 0) s.sigma[k] = norm;
      }
      team.sync();
      rank_falling(team, s.sigma, n, s.place);
      for (int k = team.rank; k < n; k += team.threads) s.source[s.place[k]] = k;
      team.sync();
      for (int e = team.rank; e < size; e += team.threads)
        s.column_a(s.place[e % n])[e / n] = matrix[e] * (R(1) / scale);
      team.sync();
      svd<T, in_registers>(team, s);
      if (vectors) complete(team, s);
    }
    for (int k = team.rank; k < n; k += team.threads) {
      const int to = isfinite(scale) ? s.place[k] : k;
      values[system * n + to] = isfinite(scale) ? s.sigma[k] * scale : scale;
    }
    for (int e = team.rank; vectors && e < size; e += team.threads) {
      const int i = e / n, k = e % n;
      const int to = isfinite(scale) ? s.place[k] : k;
      left[system * size + i * n + to] = isfinite(scale) ? s.column_k(k)[i] : not_a_number<T>();
      if (i >= n) continue;
      const int row = isfinite(scale) ? s.source[i] : i;
      right[system * square + row * n + to] = isfinite(scale) ? s.column_x(k)[i] : not_a_number<T>();
    }
    team.sync();
  }
}

template <typename T>
SvdLaunch plan(const CudaSvd& call) {
  return SvdLaunch::plan<T>(call.batch, call.rows, call.cols, call.left != nullptr);
}

template <typename T>
void run(const CudaSvd& call, void* workspace, void* stream) {
  const SvdLaunch how = plan<T>(call);
  launch(how.in_registers ? svd_kernel<T, true> : svd_kernel<T, false>, how.where(stream),
         static_cast<const T*>(call.matrices), call.batch, static_cast<int>(call.rows), static_cast<int>(call.cols),
         static_cast<Real<T>*>(call.values), static_cast<T*>(call.left), static_cast<T*>(call.right),
         static_cast<unsigned char*>(workspace), how.bytes, how.shape.threads, how.shape.width);
}

}  // namespace

int64_t cuda_svd_workspace(const CudaSvd& call) {
  if (call.batch == 0 || call.cols == 0) return 0;
  return with_number(call, [&](auto zero) { return plan<decltype(zero)>(call).workspace(); });
}

void cuda_svd(const CudaSvd& call, void* workspace, void* stream) {
  if (call.batch == 0 || call.cols == 0) return;
  with_number(call, [&](auto zero) { run<decltype(zero)>(call, workspace, stream); });
}

}  // namespace kd
