// Compiles a .cu file as C++20 for the CPU, to be tested where there is no GPU. Every CUDA thread of a block is a host
// thread, and blocks run one after another. Sanitizers then see what a GPU would do in silence: accesses outside
// shared memory (ASan), a missing barrier as the race it is (TSan), and memory nobody wrote reads as NaN.
// Threads that disagree about a collective end the program with a message, where a GPU would hang or read garbage.
// Stricter than CUDA: one-dimensional launches of whole warps, masks of all 32 lanes, and a thread that has left the
// kernel is missed at the next barrier. As in CUDA, shuffles and votes order no memory; __syncwarp does.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("kd_shared")))  // blocks take turns, so one copy serves

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

// Where the linker laid the static __shared__ variables; absent where there are none.
extern "C" __attribute__((weak)) char __start_kd_shared[];
extern "C" __attribute__((weak)) char __stop_kd_shared[];

#ifdef __SANITIZE_THREAD__
extern "C" void AnnotateIgnoreSyncBegin(const char* file, int line);
extern "C" void AnnotateIgnoreSyncEnd(const char* file, int line);
#else
inline void AnnotateIgnoreSyncBegin(const char*, int) {}
inline void AnnotateIgnoreSyncEnd(const char*, int) {}
#endif

namespace kd::host {

constexpr unsigned kWarp = 32, kAllLanes = 0xffffffffu;

template <typename... A>
[[noreturn]] void fail(const char* format, A... args) {
  static std::atomic_flag told;
  if (!told.test_and_set()) {
    std::fprintf(stderr, format, args...);
    std::fputc('\n', stderr);
    std::abort();
  }
  for (;;) std::this_thread::yield();  // another thread is telling
}

// What a thread brings to a meeting. Atomic, because a shuffle must not order anything else.
struct Slot {
  std::atomic<const char*> operation;
  std::atomic<unsigned> mask;
  std::atomic<uint64_t> value;
};

// While it lives, TSan takes no atomic operation of this thread for one that orders memory.
struct Unordered {
  Unordered() { AnnotateIgnoreSyncBegin(__FILE__, __LINE__); }
  ~Unordered() { AnnotateIgnoreSyncEnd(__FILE__, __LINE__); }
};

// As std::barrier, but it orders exactly what it says: what came before it, and what comes after. The standard
// library's threads also meet where they go to sleep and wake up, which hides races from TSan.
class Barrier {
 public:
  explicit Barrier(unsigned size) : size_(size) {}

  void wait() {
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      const Unordered quiet;
      round_.notify_all();
      return;
    }
    {
      const Unordered quiet;
      while (round_.load(std::memory_order_relaxed) == round) round_.wait(round, std::memory_order_relaxed);
    }
    round_.load(std::memory_order_acquire);
  }

 private:
  const unsigned size_;
  std::atomic<unsigned> arrived_ = 0, round_ = 0;
};

// Threads that must all do the same at the same time: those of a warp, or of a block.
class Meeting {
 public:
  explicit Meeting(unsigned size) : size_(size), barrier_(size), slots_(new Slot[2 * size]) {}

  // What each brought. There are two rows of slots: whoever is ahead writes into the other one.
  const Slot* meet(unsigned rank, unsigned& turn, const char* operation, unsigned mask = kAllLanes,
                   uint64_t value = 0) {
    Slot* row = &slots_[(turn++ & 1) * size_];
    row[rank].operation.store(operation, std::memory_order_relaxed);
    row[rank].mask.store(mask, std::memory_order_relaxed);
    row[rank].value.store(value, std::memory_order_relaxed);
    barrier_.wait();
    for (unsigned i = 0; i < size_; ++i) {
      const char* other = row[i].operation.load(std::memory_order_relaxed);
      const unsigned its_mask = row[i].mask.load(std::memory_order_relaxed);
      if (std::strcmp(other, operation) != 0)
        fail("threads disagree in block %u: thread %u is at %s, while one of its neighbours (%u of %u) is at %s",
             blockIdx.x, threadIdx.x, operation, i, size_, other);
      if (its_mask != mask)
        fail("threads disagree in block %u: thread %u is at %s with mask %08x, its neighbour %u with %08x", blockIdx.x,
             threadIdx.x, operation, mask, i, its_mask);
    }
    if (mask != kAllLanes)
      fail("thread %u is at %s with mask %08x, but only whole warps are served", threadIdx.x, operation, mask);
    return row;
  }

  void wait() { barrier_.wait(); }

 private:
  unsigned size_;
  Barrier barrier_;
  std::unique_ptr<Slot[]> slots_;
};

struct Block {
  Meeting everyone;
  std::vector<std::unique_ptr<Meeting>> warps;
  std::unique_ptr<unsigned char[]> shared;  // its exact size, so that ASan knows where it ends
  size_t shared_bytes;

  Block(unsigned threads, size_t bytes) : everyone(threads), shared(new unsigned char[bytes]), shared_bytes(bytes) {
    for (unsigned i = 0; i < threads / kWarp; ++i) warps.push_back(std::make_unique<Meeting>(kWarp));
  }

  void forget() {
    std::memset(shared.get(), 0xff, shared_bytes);
    if (__start_kd_shared) std::memset(__start_kd_shared, 0xff, __stop_kd_shared - __start_kd_shared);
  }
};

struct Thread {
  Block* block = nullptr;
  unsigned warp_turn = 0, block_turn = 0;

  const Slot* meet_warp(const char* operation, unsigned mask = kAllLanes, uint64_t value = 0) {
    Meeting& warp = *block->warps[threadIdx.x / kWarp];
    return warp.meet(threadIdx.x % kWarp, warp_turn, operation, mask, value);
  }

  // The warp meets first: a lane that is at some other collective is found there, instead of waited for.
  const Slot* meet_block(const char* operation, uint64_t value = 0) {
    meet_warp(operation);
    return block->everyone.meet(threadIdx.x, block_turn, operation, kAllLanes, value);
  }

  const Slot* exchange(const char* operation, unsigned mask, uint64_t value) {
    const Unordered quiet;
    return meet_warp(operation, mask, value);
  }
};
inline thread_local Thread self;

template <typename T>
T shuffle(const char* operation, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = self.exchange(operation, mask, bits)[source].value.load(std::memory_order_relaxed);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned ballot(const char* operation, unsigned mask, bool vote) {
  const Slot* row = self.exchange(operation, mask, vote);
  unsigned votes = 0;
  for (unsigned i = 0; i < kWarp; ++i) votes |= unsigned(row[i].value.load(std::memory_order_relaxed)) << i;
  return votes;
}

inline unsigned count(const char* operation, bool vote) {
  const Slot* row = self.meet_block(operation, vote);
  unsigned votes = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) votes += unsigned(row[i].value.load(std::memory_order_relaxed));
  return votes;
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), unsigned blocks, unsigned threads, size_t shared_bytes, A... args) {
  if (threads == 0 || threads % kWarp != 0 || threads > 1024)
    fail("a block of %u threads was launched, but only whole warps, up to 1024 threads, are served", threads);
  Block block(threads, shared_bytes);
  std::vector<std::thread> pool;
  for (unsigned rank = 0; rank < threads; ++rank)
    pool.emplace_back([&, rank] {
      self = {&block};
      threadIdx.x = rank, blockDim.x = threads, gridDim.x = blocks;
      for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        if (rank == 0) block.forget();
        block.everyone.wait();
        kernel(args...);
        self.meet_block("the end of the kernel");
      }
    });
  for (std::thread& thread : pool) thread.join();
}

}  // namespace kd::host

inline void __syncthreads() {
  kd::host::self.meet_block("__syncthreads");
}
inline int __syncthreads_count(int vote) {
  return int(kd::host::count("__syncthreads_count", vote));
}
inline int __syncthreads_or(int vote) {
  return kd::host::count("__syncthreads_or", vote) > 0;
}
inline int __syncthreads_and(int vote) {
  return kd::host::count("__syncthreads_and", vote) == blockDim.x;
}
inline void __syncwarp(unsigned mask = kd::host::kAllLanes) {
  kd::host::self.meet_warp("__syncwarp", mask);
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
  return kd::host::ballot("__ballot_sync", mask, vote);
}
inline int __any_sync(unsigned mask, int vote) {
  return kd::host::ballot("__any_sync", mask, vote) != 0;
}
inline int __all_sync(unsigned mask, int vote) {
  return kd::host::ballot("__all_sync", mask, vote) == kd::host::kAllLanes;
}

// Lanes are grouped by `width`; a source outside the own group is the lane itself, as in CUDA.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = int(threadIdx.x % 32), first = lane / width * width;
  return kd::host::shuffle("__shfl_sync", mask, value, unsigned(first + (source & (width - 1))));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int offset, int width = 32) {
  const int lane = int(threadIdx.x % 32), source = lane ^ offset;
  return kd::host::shuffle("__shfl_xor_sync", mask, value, unsigned(source / width > lane / width ? lane : source));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset, int width = 32) {
  const int lane = int(threadIdx.x % 32), source = lane + int(offset);
  return kd::host::shuffle("__shfl_down_sync", mask, value, unsigned(source / width != lane / width ? lane : source));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned offset, int width = 32) {
  const int lane = int(threadIdx.x % 32), source = lane - int(offset);
  return kd::host::shuffle("__shfl_up_sync", mask, value, unsigned(source < lane / width * width ? lane : source));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  const kd::host::Slot* row = kd::host::self.exchange("__reduce_add_sync", mask, value);
  unsigned sum = 0;
  for (unsigned i = 0; i < 32; ++i) sum += unsigned(row[i].value.load(std::memory_order_relaxed));
  return sum;
}

template <typename T>
T atomicAdd(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
template <typename T>
T atomicExch(T* address, T value) {
  return std::atomic_ref<T>(*address).exchange(value, std::memory_order_relaxed);
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;
}

// Arithmetic that is never contracted; compile with -ffp-contract=off.
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
inline double __dadd_rn(double a, double b) {
  return a + b;
}
inline double __fma_rn(double a, double b, double c) {
  return std::fma(a, b, c);
}
using std::fabs, std::fmax, std::ilogb, std::isfinite, std::scalbn, std::sqrt;
