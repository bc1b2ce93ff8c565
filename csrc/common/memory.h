// Workspace memory: aligned, and in huge pages where it is large, because first touch costs a fault per page.
#pragma once

#include <cstddef>

namespace kd {

void* allocate(size_t bytes);  // 64-byte aligned; throws std::bad_alloc
void release(void* memory) noexcept;
// Of memory that others allocated and nobody has touched yet: what lies in whole huge pages will be in them.
void expect_whole(void* memory, size_t bytes) noexcept;

}  // namespace kd
