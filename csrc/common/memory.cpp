#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace kd {

constexpr size_t huge = size_t{1} << 21;

void* allocate(size_t bytes) {
  constexpr size_t line = 64;
  const size_t alignment = bytes >= 2 * huge ? huge : line;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded ? rounded : alignment);
  if (!memory) throw std::bad_alloc();
#ifdef __linux__
  if (alignment == huge) madvise(memory, rounded, MADV_HUGEPAGE);  // advice only: failure costs time, not results
#endif
  return memory;
}

void expect_whole([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) noexcept {
#ifdef __linux__
  const auto at = reinterpret_cast<uintptr_t>(memory), first = (at + huge - 1) / huge * huge;
  const uintptr_t end = (at + bytes) / huge * huge;
  if (end >= first + 2 * huge) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

void release(void* memory) noexcept {
  std::free(memory);
}

}  // namespace kd
