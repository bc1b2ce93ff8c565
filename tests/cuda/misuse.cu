// Kernels that are wrong on purpose, each in one way; the argument says which runs.
#include <cstdio>
#include <string>

#include "launch.h"

namespace {

__global__ void right(float* out) {
  __shared__ float row[64];
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = row[63 - threadIdx.x];
}

__global__ void no_barrier(float* out) {
  __shared__ float row[64];
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = row[63 - threadIdx.x];
}

// A shuffle meets the others, but does not order what they wrote.
__global__ void shuffle_for_barrier(float* out) {
  float* row = reinterpret_cast<float*>(kd::dynamic_shared());
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  out[threadIdx.x] += row[threadIdx.x ^ 1];
}

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void early_exit(float* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void other_operation(float* out) {
  out[threadIdx.x] = threadIdx.x == 3 ? __ballot_sync(0xffffffffu, 1) : __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void other_mask(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(threadIdx.x == 3 ? 0xffu : 0xffffffffu, 1.0f, 1);
}

__global__ void unwritten(float* out) {
  __shared__ float row[64];
  out[threadIdx.x] = row[threadIdx.x] + reinterpret_cast<float*>(kd::dynamic_shared())[threadIdx.x];
}

__global__ void beyond(float* out) {
  out[threadIdx.x] = reinterpret_cast<float*>(kd::dynamic_shared())[64];
}

// Sums of all kinds, each equal to blockDim.x.
__global__ void collectives(float* out) {
  const int lane = static_cast<int>(threadIdx.x % 32), warps = static_cast<int>(blockDim.x / 32);
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, 1);
  const bool counted = __syncthreads_count(1) == total && __syncthreads_and(1) && !__syncthreads_or(0);
  int prefix = 1;
  for (unsigned offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, prefix, offset);
    if (lane >= static_cast<int>(offset)) prefix += before;
  }
  int sum = 1;
  for (unsigned offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  sum = __shfl_sync(0xffffffffu, sum, 0);
  const bool votes = __ballot_sync(0xffffffffu, lane % 2) == 0xaaaaaaaau && __any_sync(0xffffffffu, lane == 7) &&
                     !__all_sync(0xffffffffu, lane == 7);
  const bool all = counted && votes && prefix == lane + 1 && __reduce_add_sync(0xffffffffu, 1u) == 32;
  out[threadIdx.x] = all ? static_cast<float>(sum * warps) : -1.0f;
}

}  // namespace

int main(int, char** argv) {
  struct Case {
    const char* name;
    void (*kernel)(float*);
  };
  const Case cases[] = {{"right", right},
                        {"no_barrier", no_barrier},
                        {"shuffle_for_barrier", shuffle_for_barrier},
                        {"divergent_barrier", divergent_barrier},
                        {"early_exit", early_exit},
                        {"other_operation", other_operation},
                        {"other_mask", other_mask},
                        {"unwritten", unwritten},
                        {"beyond", beyond},
                        {"collectives", collectives}};
  float out[64] = {};
  for (const Case& c : cases)
    if (c.name == std::string(argv[1])) kd::launch(c.kernel, {2, 64, 64 * sizeof(float), nullptr}, +out);
  for (float x : out) std::printf("%g ", x);
}
