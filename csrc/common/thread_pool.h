// A small fork-join pool. Tasks must not throw. Which worker runs a task never influences a result.
#pragma once

#include <cstdint>

namespace kd {

using Task = void (*)(void* context, int64_t index, int worker);

// Run task(context, i, worker) for i in [0, count), on up to `threads` threads with 0 <= worker < threads.
// A call that finds the pool busy (another Python thread, or a nested call) runs on its own thread alone.
void parallel_run(int threads, int64_t count, Task task, void* context);

}  // namespace kd
