// Random numbers that are a function of where they are used: Philox 4×32-10 (Salmon et al. 2011, SC'11), for C++ and
// CUDA. kdkernels/philox.py is the same function in Python, and says how dropout masks are drawn from it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define KD_HOST_DEVICE __host__ __device__
#else
#define KD_HOST_DEVICE
#endif

namespace kd {

struct Philox {
  static constexpr uint32_t multipliers[2] = {0xD2511F53u, 0xCD9E8D57u};
  static constexpr uint32_t weyl[2] = {0x9E3779B9u, 0xBB67AE85u};
  static constexpr int rounds = 10;
};

struct PhiloxBlock {
  uint32_t words[4];
};

// Static: every file that includes it has its own copy, compiled for its own instruction set.
KD_HOST_DEVICE static inline PhiloxBlock philox4x32(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  uint32_t* c = counter.words;
  for (int round = 0; round < Philox::rounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(Philox::multipliers[0]) * c[0];
    const uint64_t product1 = static_cast<uint64_t>(Philox::multipliers[1]) * c[2];
    c[0] = static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key0;
    c[1] = static_cast<uint32_t>(product1);
    c[2] = static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key1;
    c[3] = static_cast<uint32_t>(product0);
    key0 += Philox::weyl[0];
    key1 += Philox::weyl[1];
  }
  return counter;
}

}  // namespace kd
