#include "memory.h"

#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace kd {

void* allocate(size_t bytes) {
  constexpr size_t line = 64, huge = size_t{1} << 21;
  const size_t alignment = bytes >= 2 * huge ? huge : line;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded ? rounded : alignment);
  if (!memory) throw std::bad_alloc();
#ifdef __linux__
  if (alignment == huge) madvise(memory, rounded, MADV_HUGEPAGE);  // advice only: failure costs time, not results
#endif
  return memory;
}

void release(void* memory) noexcept {
  std::free(memory);
}

}  // namespace kd
