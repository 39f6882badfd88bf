// Reading and merging tiles of the dyadic logit histogram (histogram.h): whatever is streamed, cells are codes here.
#pragma once
#include "../histogram.h"

namespace bkd {

// Cells in rows of `row_cells` cells that share a count; arrays over cells are padded to whole tiles.
struct SketchTiles {
  uint16_t* counters;  // [tiles][bins][kTileCells]; the codes themselves, in any order, while a row's count is <= bins
  int16_t* minimum;    // [tiles * kTileCells]
  int16_t* maximum;
  const int32_t* counts;  // [rows]
  int64_t rows;
  int64_t row_cells;
  int32_t log2_bins;
};

// Sorts the codes of every cell that still keeps them, so that equal multisets are equal states.
void sketch_sort(const SketchTiles& sketch, int threads);

// The order statistic ceil(q n) of every cell: it lies in codes lower..upper (inclusive), and `point` interpolates there.
// Cells without draws get lower = upper = 0 and point NaN.
void sketch_quantile(const SketchTiles& sketch, double q, int32_t* lower, int32_t* upper, float* point, int threads);

// Every cell's draws in rows [begin, end), at the level of codes least..most, which must hold the cell's own: counts[i][b] is how
// many have code >> level == (least >> level) + b. Arrays start at the first of these cells.
void sketch_histogram(const SketchTiles& sketch, int64_t begin, int64_t end, const int16_t* least, const int16_t* most,
                      int32_t* counts, int threads);

// Adds the codes of `other` to `sketch` (counters, minimum, maximum; not counts). Pooled counts must stay below 65536.
void sketch_merge(const SketchTiles& sketch, const SketchTiles& other, int threads);

// Per row, the level[row] quantile of the values -2 log p of all cells and codes, each weighing p = sigmoid(code / 1024)
// (weights normalised). A bin stands for eight points, evenly spread. Rows without draws get NaN.
void sketch_deviance_quantile(const SketchTiles& sketch, const double* level, float* out, int threads);

}  // namespace bkd
