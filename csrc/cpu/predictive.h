// Operation C on the CPU: W draws of logits for a batch of rows go into the posterior predictive's per-cell state.
#pragma once
#include "../histogram.h"
#include "cpu/dispatch.h"

namespace bkd {

constexpr int kMaxDraws = 64;       // of one window: with kMaxBins old codes, still below the 255 that a byte counts
constexpr int kScratchPadding = 16;  // vectors may read and write that far beyond the last row

// All arrays over cells are padded to whole tiles of kTileCells; cell = row * classes + class.
struct PredictiveState {
  uint16_t* counters;  // [tiles][bins][kTileCells]
  int16_t* minimum;    // [tiles * kTileCells]
  int16_t* maximum;
  float* mean;
  float* m2;
  float* reference;     // mean of the row's first window, at least 2^-126
  int32_t* counts;      // [rows] draws taken
  int32_t* invalid;     // [rows] draws excluded
  double* entropy;      // [rows] sum over draws of H[p]
  double* divergence;   // [rows] sum over draws of KL(p || reference)
  int64_t rows;
  int32_t classes;
  int32_t log2_bins;
};

// Logits of `draws` <= kMaxDraws draws: draw w of batch row b starts at logits + w * draw_stride + b * classes.
struct PredictiveWindow {
  const float* logits;
  int64_t draw_stride;
  int32_t draws;
  const int64_t* rows;   // [size] rows of the state, ascending
  const int64_t* batch;  // [size] the batch row of each
  int64_t size;
};

// What a block of rows needs to remember of every (draw, row) between the two stages.
enum Statistic { kMaximum, kTotal, kRest, kInverseTotal, kLogTotal, kValid, kStatistics };

constexpr int64_t scratch_floats(int64_t row_capacity, int32_t draws) {
  return (static_cast<int64_t>(kStatistics) * draws + 1) * row_capacity;  // and the number of valid draws of every row
}

// Sorted rows [begin, end), which share no tile with other rows of the batch. scratch holds
// scratch_floats(row_capacity, draws), row_capacity >= end - begin + kScratchPadding.
BKD_DECLARE(void, predictive_block,
            (const PredictiveState& state, const PredictiveWindow& window, int64_t begin, int64_t end, int64_t row_capacity,
             float* scratch))

// The whole window, on `threads` threads; the result does not depend on their number.
void predictive_update(const PredictiveState& state, const PredictiveWindow& window, int threads);

}  // namespace bkd
