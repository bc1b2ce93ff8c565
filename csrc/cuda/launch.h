// What a .cu file needs besides its kernels: the CUDA runtime, or host.h in its place, and one way to launch.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#else
#include "host.h"
#endif

namespace kd {

struct Launch {
  int64_t blocks;
  int threads;
  size_t shared;  // bytes
  void* stream;
};

#ifdef __CUDACC__

// Those that share a workspace, taking turns at the systems: two on each multiprocessor of an H100.
constexpr int64_t kResidentBlocks = 264;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// Bytes of shared memory that a block may ask for on the current device.
inline size_t shared_limit() {
  int device, bytes;
  check(cudaGetDevice(&device), "no device can be used");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  return static_cast<size_t>(bytes);
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), const Launch& where, A... args) {
  constexpr size_t without_asking = 48 << 10;
  if (where.shared > without_asking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(where.shared)),
          "shared memory");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(where.blocks));
  config.blockDim = dim3(static_cast<unsigned>(where.threads));
  config.dynamicSmemBytes = where.shared;
  config.stream = static_cast<cudaStream_t>(where.stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...), "launch");
}

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

#else

constexpr int64_t kResidentBlocks = 1;

inline size_t host_shared_limit = 99 << 10;  // as on the smallest of the devices served
inline size_t shared_limit() {
  return host_shared_limit;
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), const Launch& where, A... args) {
  host::launch(kernel, static_cast<unsigned>(where.blocks), static_cast<unsigned>(where.threads), where.shared,
               static_cast<P>(args)...);
}

inline unsigned char* dynamic_shared() {
  return host::self.block->shared.get();
}

#endif

}  // namespace kd
