// The threads that work on one system: a warp, or a whole block. They form groups, of which each owns a column (or a
// pair of them, or a row) at a time; the lanes of a group share its elements, i = lane, lane + width, …
// Every loop over columns runs equally often in all groups, so that whole warps meet at every shuffle.
#pragma once

#include "number.cuh"

namespace kd {

constexpr int kWarpSize = 32;
constexpr unsigned kWarpMask = 0xffffffffu;
constexpr int kMaxWarps = 16;

// Threads of a block: 128 registers each; doubles need more.
template <typename T>
constexpr int kMaxThreads = sizeof(Real<T>) == 8 ? 256 : 512;

struct TeamShape {
  int threads;  // of a team: a warp, or several, which are then a block
  int width;    // lanes of a group, a power of two
  int teams;    // of a block

  int block() const { return threads * teams; }

  // Fewer teams a block, if each wants much shared memory.
  void fit(int64_t bytes, int64_t limit) {
    while (teams > 1 && teams * bytes > limit) --teams;
  }
};

// For `count` columns (or pairs, or rows) of `length` elements: at most `held` elements a lane, and no idle lanes.
template <typename T>
TeamShape team_shape(int64_t count, int64_t length, int held) {
  int width = 1;
  while (width < kWarpSize && (width * held < length || width * 2 * count <= kWarpSize)) width *= 2;
  int64_t threads = (count * width + kWarpSize - 1) / kWarpSize * kWarpSize;
  if (threads > kMaxThreads<T>) threads = kMaxThreads<T>;
  return {static_cast<int>(threads), width, threads == kWarpSize ? 4 : 1};
}

inline int64_t blocks_for(int64_t systems, const TeamShape& shape, int64_t limit) {
  constexpr int64_t grid_limit = (int64_t(1) << 31) - 1;
  const int64_t blocks = (systems + shape.teams - 1) / shape.teams;
  limit = limit < grid_limit ? limit : grid_limit;
  return blocks < limit ? blocks : limit;
}

struct Team {
  int rank, threads;       // this thread among those of the team
  int lane, width;         // among those of its group
  int group, groups;       // its group among those of the team
  int64_t index, systems;  // the team among all teams of the launch
  int in_block;            // the team among those of its block

  __device__ Team(int threads_, int width_) : threads(threads_), width(width_) {
    const int teams = static_cast<int>(blockDim.x) / threads;
    in_block = static_cast<int>(threadIdx.x) / threads;
    rank = static_cast<int>(threadIdx.x) % threads;
    lane = rank % width;
    group = rank / width;
    groups = threads / width;
    index = static_cast<int64_t>(blockIdx.x) * teams + in_block;
    systems = static_cast<int64_t>(gridDim.x) * teams;
  }

  __device__ __forceinline__ void sync() const { threads == kWarpSize ? __syncwarp() : __syncthreads(); }

  __device__ __forceinline__ bool any(bool vote) const {
    return threads == kWarpSize ? __any_sync(kWarpMask, vote) : __syncthreads_or(vote);
  }

  // `count` rounded up, so that all groups take part in the last round.
  __device__ __forceinline__ int rounds(int count) const { return (count + groups - 1) / groups * groups; }

  // This lane's first element that is not before `begin`.
  __device__ __forceinline__ int first(int begin) const {
    return lane >= begin ? lane : lane + (begin - lane + width - 1) / width * width;
  }

  // Butterflies: every lane of the group gets the same bits.
  template <typename R>
  __device__ __forceinline__ R sum(R x) const {
    for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kWarpMask, x, offset);
    return x;
  }
  template <typename R>
  __device__ __forceinline__ Complex<R> sum(Complex<R> x) const {
    return {sum(x.re), sum(x.im)};
  }
  template <typename R>
  __device__ __forceinline__ R max(R x) const {
    for (int offset = width / 2; offset > 0; offset /= 2) x = fmax(x, __shfl_xor_sync(kWarpMask, x, offset));
    return x;
  }

  // Over the whole team. `scratch` has room for one number of every warp.
  template <typename R>
  __device__ R max_of_team(R x, R* scratch) const {
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x = fmax(x, __shfl_xor_sync(kWarpMask, x, offset));
    if (threads == kWarpSize) return x;
    if (rank % kWarpSize == 0) scratch[rank / kWarpSize] = x;
    sync();
    for (int warp = 0; warp < threads / kWarpSize; ++warp) x = fmax(x, scratch[warp]);
    sync();
    return x;
  }
};

// ‖x‖ of a column from `begin` on, where squares of its elements may underflow. The lanes of the group share it.
template <typename T>
__device__ Real<T> safe_norm(const Team& team, const T* x, int begin, int end) {
  using R = Real<T>;
  constexpr R tiny = Limits<R>::tiny;
  R largest = 0;
  for (int i = team.first(begin); i < end; i += team.width) largest = fmax(largest, largest_part(x[i]));
  largest = team.max(largest);
  const R scale = R(1) / fmax(largest, tiny);
  R squares = 0;
  for (int i = team.first(begin); i < end; i += team.width) squares += abs2(x[i] * scale);
  squares = team.sum(squares);
  return largest < tiny ? R(0) : largest * sqrt(squares);
}

// The power of two just above `largest`, and its reciprocal: scaling by them is exact.
template <typename R>
struct Scale {
  R up, down;

  __device__ explicit Scale(R largest) : up(1), down(1) {
    constexpr int limit = Limits<R>::max_exponent - 2;  // both must be normal numbers
    if (largest == R(0)) return;
    int exponent = ilogb(largest) + 1;
    exponent = exponent > limit ? limit : exponent < -limit ? -limit : exponent;
    up = scalbn(R(1), exponent);
    down = scalbn(R(1), -exponent);
  }
};

}  // namespace kd
