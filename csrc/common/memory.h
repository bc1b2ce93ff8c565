// Workspace memory: aligned, and in huge pages where it is large, because first touch costs a fault per page.
#pragma once

#include <cstddef>

namespace kd {

void* allocate(size_t bytes);  // 64-byte aligned; throws std::bad_alloc
void release(void* memory) noexcept;

}  // namespace kd
