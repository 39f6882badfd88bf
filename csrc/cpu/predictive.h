// Operation C on the CPU: W draws of logits for a batch of rows go into the posterior predictive's per-cell state.
#pragma once
#include "../predictive_state.h"
#include "cpu/dispatch.h"

namespace bkd {

constexpr int kScratchPadding = 16;  // vectors may read and write that far beyond the last row

// What a block of rows needs to remember of every (draw, row) between the two stages.
enum Statistic { kMaximum, kTotal, kRest, kInverseTotal, kLogTotal, kValid, kStatistics };

constexpr int64_t scratch_floats(int64_t row_capacity, int32_t draws) {
  return (static_cast<int64_t>(kStatistics) * draws + 1) * row_capacity;  // and the number of valid draws of every row
}

// Sorted rows [begin, end), which share no tile with other rows of the batch. scratch holds
// scratch_floats(row_capacity, draws), row_capacity >= end - begin + kScratchPadding.
BKD_DECLARE(void, predictive_block,
            (const PredictiveState& state, const PredictiveWindow& window, const PickedCodes& picked, int64_t begin, int64_t end,
             int64_t row_capacity, float* scratch))

// The whole window, on `threads` threads; the result does not depend on their number.
void predictive_update(const PredictiveState& state, const PredictiveWindow& window, const PickedCodes& picked, int threads);

}  // namespace bkd
