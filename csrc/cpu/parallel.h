// Parallel loops on the threads that torch already has: a second pool beside torch's would fight it for the cores.
#pragma once
#include <cstdint>

namespace bkd {

// Calls body(context, task) for every task in [0, tasks), on at most `threads` threads; returns when all are done.
// Threads take the next task as they become free, so tasks should be a few per thread. `body` must not throw.
void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context);

template <class F>
static inline void parallel_for(int64_t tasks, int threads, F&& f) {
  parallel_for(
      tasks, threads, [](void* context, int64_t task) { (*static_cast<F*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

const char* threading_name();  // "torch's OpenMP" or "std::thread", for `bkd-fast doctor`

}  // namespace bkd
