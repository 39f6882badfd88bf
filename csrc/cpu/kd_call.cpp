// One call of the KD energy: the cut into tasks, the threads' scratch, and the sum of what the tasks report.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "cpu/kd.h"
#include "cpu/parallel.h"

namespace bkd {
namespace {

constexpr int64_t kTaskLogits = 32768;  // about 15 microseconds of work: long against taking a task, short against a batch

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t(kScratchAlignment)); }
};

int64_t scratch_bytes(const KdSettings& settings) {
  const int64_t bytes = kd_fast_scratch(settings.classes) * static_cast<int64_t>(sizeof(float)) +
                        kd_general_scratch(settings) * static_cast<int64_t>(sizeof(double));
  return (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
}

}  // namespace

KdTiling kd_tiling(const KdCall& call) {
  KdTiling t;
  const int64_t classes = call.settings.classes;
  t.block_rows = std::clamp<int64_t>(kTaskLogits / classes, 1, kBlockRows);
  t.blocks_per_chain = (call.rows + t.block_rows - 1) / t.block_rows;
  t.blocks = t.blocks_per_chain * call.chains;
  t.blocks_per_task = std::max<int64_t>(1, kTaskLogits / (t.block_rows * classes));
  t.tasks = (t.blocks + t.blocks_per_task - 1) / t.blocks_per_task;
  return t;
}

KdTaskResult kd_energy(const KdCall& call, int threads) {
  const KdTiling tiling = kd_tiling(call);
  const int workers = static_cast<int>(std::clamp<int64_t>(tiling.tasks, 1, std::max(threads, 1)));
  const int64_t bytes = scratch_bytes(call.settings);
  const std::unique_ptr<char[], AlignedDelete> scratch(
      static_cast<char*>(::operator new[](static_cast<size_t>(bytes * workers), std::align_val_t(kScratchAlignment))));
  std::vector<KdTaskResult> results(static_cast<size_t>(tiling.tasks));
  std::atomic<int64_t> next{0};
  parallel_for(workers, workers, [&](int64_t worker) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tiling.tasks;)
      results[static_cast<size_t>(task)] = BKD_CALL(kd_task, call, tiling, task, scratch.get() + worker * bytes);
  });
  KdTaskResult all{0.0, -1, Fault::none};
  for (const KdTaskResult& result : results) {
    all.energy += result.energy;
    if (all.bad_row < 0 && result.bad_row >= 0) {
      all.bad_row = result.bad_row;
      all.fault = result.fault;
    }
  }
  return all;
}

}  // namespace bkd
