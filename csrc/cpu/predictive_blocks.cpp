// The posterior predictive's update, spread over threads.
#include <memory>

#include "cpu/predictive.h"
#include "cpu/row_blocks.h"

namespace bkd {
namespace {

constexpr int64_t kBlockBytes = 128 * 1024;  // of logits: with its statistics, a block stays in the second-level cache

int64_t planned_rows(const PredictiveWindow& window, int32_t classes) {
  const int64_t rows = kBlockBytes / (static_cast<int64_t>(sizeof(float)) * window.draws * classes);
  return rows < 1 ? 1 : rows > 256 ? 256 : rows;
}

}  // namespace

void predictive_update(const PredictiveState& state, const PredictiveWindow& window, const PickedCodes& picked, int threads) {
  const RowBlocks blocks(window.rows, window.size, state.classes, planned_rows(window, state.classes));
  const int64_t capacity = blocks.capacity() + kScratchPadding;
  blocks.each_thread(threads, [&](const auto& next) {
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(scratch_floats(capacity, window.draws))]);
    for (int64_t begin, end; next(begin, end);)
      BKD_CALL(predictive_block, state, window, picked, begin, end, capacity, scratch.get());
  });
}

}  // namespace bkd
