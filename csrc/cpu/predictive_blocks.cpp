// Cuts the rows of an update into blocks that share no tile and hands them to threads: every row and every tile is
// updated by one thread in one order, so that results do not depend on the number of threads.
#include <atomic>
#include <memory>

#include "cpu/parallel.h"
#include "cpu/predictive.h"

namespace bkd {
namespace {

constexpr int64_t kBlockBytes = 128 * 1024;  // of logits: with its statistics, a block stays in the second-level cache

// Whether a block may start at sorted row i: its tile is not the tile where row i - 1 ends.
bool starts_block(const PredictiveWindow& window, int32_t classes, int64_t i) {
  if (i <= 0 || i >= window.size) return true;
  const int64_t last_tile = ((window.rows[i - 1] + 1) * classes - 1) / kTileCells;
  return window.rows[i] * classes / kTileCells != last_tile;
}

int64_t block_start(const PredictiveWindow& window, int32_t classes, int64_t i) {
  while (!starts_block(window, classes, i)) ++i;
  return i < window.size ? i : window.size;
}

int64_t planned_rows(const PredictiveWindow& window, int32_t classes) {
  const int64_t rows = kBlockBytes / (static_cast<int64_t>(sizeof(float)) * window.draws * classes);
  return rows < 1 ? 1 : rows > 256 ? 256 : rows;
}

}  // namespace

void predictive_update(const PredictiveState& state, const PredictiveWindow& window, int threads) {
  const int64_t planned = planned_rows(window, state.classes);
  // every kTileCells-th row starts a tile, so a block is at most that much longer than planned
  const int64_t capacity = planned + kTileCells + kScratchPadding;
  const int64_t blocks = (window.size + planned - 1) / planned;
  const int64_t workers = blocks < threads ? blocks : threads;
  std::atomic<int64_t> next{0};
  parallel_for(workers, threads, [&](int64_t) {
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(scratch_floats(capacity, window.draws))]);
    for (int64_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
      const int64_t begin = block_start(window, state.classes, block * planned);
      const int64_t end = block_start(window, state.classes, (block + 1) * planned);
      if (begin < end) BKD_CALL(predictive_block, state, window, begin, end, capacity, scratch.get());
    }
  });
}

}  // namespace bkd
