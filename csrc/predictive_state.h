// The arrays of the posterior predictive: its state, and a window of draws that goes into it.
#pragma once
#include "histogram.h"

namespace bkd {

constexpr int kMaxDraws = 64;  // of one window: with kMaxBins old codes, still below the 255 that a byte counts

// All arrays over cells are padded to whole tiles of kTileCells; cell = row * classes + class. Without counters (nullptr) there is
// no histogram: minimum, maximum and log2_bins mean nothing then.
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

// Chosen classes of every row, whose codes are wanted besides.
struct PickedCodes {
  const int32_t* classes;  // [state's rows][picks], each below the number of classes
  int32_t picks;
  int16_t* codes;  // [draws][size][picks], in the order of the window's rows
  uint8_t* valid;  // [draws][size] whether the draw of the row counts
};

}  // namespace bkd
