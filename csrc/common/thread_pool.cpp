#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef __unix__
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace kd {
namespace {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

constexpr int kSpins = 2000;  // about 50 us: longer than the gap between two phases of a product

class Pool {
 public:
  void run(int threads, int64_t count, Task task, void* context) {
    if (threads <= 1 || count <= 1 || !busy_.try_lock()) {
      for (int64_t i = 0; i < count; ++i) task(context, i, 0);
      return;
    }
    std::lock_guard<std::mutex> guard(busy_, std::adopt_lock);
    const int helpers = grow(static_cast<int>(count < threads ? count : threads) - 1);
    task_ = task;
    context_ = context;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    running_.store(helpers, std::memory_order_relaxed);
    seats_.store(helpers, std::memory_order_release);  // from here on a worker may take a seat
    {
      std::lock_guard<std::mutex> lock(mutex_);
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(0);
    if (const int untaken = seats_.exchange(0, std::memory_order_acq_rel); untaken > 0)
      running_.fetch_sub(untaken, std::memory_order_relaxed);  // whoever still sleeps is not waited for
    for (int spins = 0; running_.load(std::memory_order_acquire) != 0; ++spins)
      spins < kSpins ? pause() : std::this_thread::yield();
  }

 private:
  // Workers beyond those asked for see no free seat and go back to sleep.
  int grow(int wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread(&Pool::serve, this, epoch_.load()).detach();
    } catch (const std::system_error&) {  // the system has no more threads: fewer will do
    }
    return workers_ < wanted ? workers_ : wanted;
  }

  void serve(uint64_t seen) {
    for (;;) {
      for (int spins = 0; spins < kSpins && epoch_.load(std::memory_order_acquire) == seen; ++spins) pause();
      if (epoch_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
      }
      seen = epoch_.load(std::memory_order_acquire);
      const int seat = seats_.fetch_sub(1, std::memory_order_acq_rel);
      if (seat > 0) {
        work(seat);
        running_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  void work(int worker) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) task_(context_, i, worker);
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> running_{0}, seats_{0};
  int workers_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
};

// Threads of an OpenMP runtime that is in the process already, as torch's is. They spin for milliseconds after each
// of torch's loops, so other threads beside them would get half a core. GOMP_parallel is what GNU's, LLVM's and Intel's
// runtimes all export. Not in a forked child, where these runtimes hang.
struct Shared {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_number)() = nullptr;
  explicit operator bool() const { return parallel && thread_number; }
};

Shared find_shared() {
  Shared found;
#ifdef __unix__
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  found.thread_number = reinterpret_cast<decltype(found.thread_number)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
#endif
  return found;
}

std::atomic<bool> forked{false};

struct Loop {
  Task task;
  void* context;
  int64_t count;
  int (*thread_number)();
  std::atomic<int64_t> next{0};

  static void work(void* self) {
    Loop& loop = *static_cast<Loop*>(self);
    const int worker = loop.thread_number();
    for (int64_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.count;)
      loop.task(loop.context, i, worker);
  }
};

// Never destroyed: workers may outlive static destructors. A forked child has no workers, so it gets a new pool.
std::atomic<Pool*> pool{new Pool};
#ifdef __unix__
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
  pool = new Pool;
  forked = true;
});
#endif

}  // namespace

void parallel_run(int threads, int64_t count, Task task, void* context) {
  static const Shared shared = find_shared();
  if (threads <= 1 || count <= 1 || !shared || forked) return pool.load()->run(threads, count, task, context);
  Loop loop{task, context, count, shared.thread_number};
  shared.parallel(&Loop::work, &loop, static_cast<unsigned>(count < threads ? count : threads), 0);
}

}  // namespace kd
