#include "cpu/parallel.h"

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#include <link.h>
#endif

namespace bkd {
namespace {

// torch's wheels bundle an OpenMP runtime whose idle workers spin between parallel regions. Two such pools on the same
// cores stall each other for milliseconds (docs/performance.md), so the loops here run on the pool that is already loaded: every
// OpenMP runtime (libgomp, libomp, libiomp5) exports GOMP_parallel with this signature.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_loaded_openmp() {
#ifdef __linux__
  std::vector<std::string> paths;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        const std::string path = info->dlpi_name ? info->dlpi_name : "";
        const std::string name = path.substr(path.rfind('/') + 1);
        for (const char* runtime : {"libgomp", "libomp", "libiomp5"})
          if (name.rfind(runtime, 0) == 0) {
            auto& found = *static_cast<std::vector<std::string>*>(data);
            // torch's own copy first: scikit-learn and others bundle theirs too
            found.insert(path.find("torch") != std::string::npos ? found.begin() : found.end(), path);
          }
        return 0;
      },
      &paths);
  for (const std::string& path : paths)
    if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD))
      if (void* symbol = dlsym(library, "GOMP_parallel")) return reinterpret_cast<GompParallel>(symbol);
#endif
  return nullptr;
}

GompParallel openmp() {
  static const GompParallel found = find_loaded_openmp();  // the extension is imported after torch
  return found;
}

struct Loop {
  std::atomic<int64_t> next{0};
  int64_t tasks;
  void (*body)(void*, int64_t);
  void* context;
};

void run(void* data) {
  Loop& loop = *static_cast<Loop*>(data);
  for (int64_t task; (task = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.tasks;) loop.body(loop.context, task);
}

}  // namespace

void parallel_for(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  Loop loop;
  loop.tasks = tasks;
  loop.body = body;
  loop.context = context;
  if (threads <= 1) return run(&loop);
  if (GompParallel parallel = openmp()) return parallel(run, &loop, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(run, &loop);
  run(&loop);
  for (std::thread& thread : others) thread.join();
}

const char* threading_name() { return openmp() ? "torch's OpenMP" : "std::thread"; }

}  // namespace bkd
