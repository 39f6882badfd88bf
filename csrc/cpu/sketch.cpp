// Reading and merging sketches cell by cell: compiled once, for it is rare beside the updates.
#include "cpu/sketch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../sketch.h"
#include "cpu/parallel.h"
#include "cpu/row_blocks.h"
#include "cpu/sketch_update.h"

namespace bkd {
namespace {

constexpr int64_t kTilesPerTask = 64;

int64_t cells_of(const SketchTiles& s) { return s.rows * s.row_cells; }
int64_t tiles_of(const SketchTiles& s) { return (cells_of(s) + kTileCells - 1) / kTileCells; }
int bins_of(const SketchTiles& s) { return 1 << s.log2_bins; }

uint16_t* column_of(const SketchTiles& s, int64_t cell) {
  return s.counters + cell / kTileCells * bins_of(s) * kTileCells + cell % kTileCells;
}

// Side by side: a column's slots are 128 bytes apart.
void read_column(const uint16_t* column, int count, uint16_t* out) {
  for (int i = 0; i < count; ++i) out[i] = column[i * kTileCells];
}

void write_column(uint16_t* column, int count, const uint16_t* values) {
  for (int i = 0; i < count; ++i) column[i * kTileCells] = values[i];
}

// f(cell, the number of draws of its row) for all cells, in parallel
template <class F>
void each_cell(const SketchTiles& s, int threads, F&& f) {
  const int64_t per_task = kTilesPerTask * kTileCells, cells = cells_of(s);
  parallel_for((cells + per_task - 1) / per_task, threads, [&](int64_t task) {
    const int64_t end = std::min(cells, (task + 1) * per_task);
    int64_t row = task * per_task / s.row_cells, row_end = (row + 1) * s.row_cells;
    for (int64_t cell = task * per_task; cell < end; ++cell) {
      if (cell == row_end) {
        ++row;
        row_end += s.row_cells;
      }
      f(cell, static_cast<int>(s.counts[row]));
    }
  });
}

void merge_cell(const SketchTiles& s, const SketchTiles& other, int64_t cell, int count, int other_count) {
  if (other_count == 0) return;
  const int bins = bins_of(s);
  const int min = std::min(s.minimum[cell], other.minimum[cell]), max = std::max(s.maximum[cell], other.maximum[cell]);
  uint16_t own[kMaxBins], others[kMaxBins], merged[kMaxBins] = {};
  read_column(column_of(s, cell), bins, own);
  read_column(column_of(other, cell), bins, others);
  merge_cells(own, count, s.minimum[cell], s.maximum[cell], others, other_count, other.minimum[cell], other.maximum[cell], min,
              max, s.log2_bins, merged);
  write_column(column_of(s, cell), bins, merged);
  s.minimum[cell] = static_cast<int16_t>(min);
  s.maximum[cell] = static_cast<int16_t>(max);
}

constexpr int kCodes = kCodeMax - kCodeMin + 1;

// p of every code from kCodeMin on: a look-up instead of an exponential for each of a cell's hundreds of points
const std::vector<float>& probability_of_codes() {
  static const std::vector<float> table = [] {
    std::vector<float> p(kCodes);
    for (int i = 0; i < kCodes; ++i)
      p[static_cast<size_t>(i)] = static_cast<float>(1 / (1 + std::exp(-(kCodeMin + i) / static_cast<double>(kCodesPerLogit))));
    return p;
  }();
  return table;
}

// Whether all cells of the tile count already, in both sketches.
bool counts_everywhere(const SketchTiles& s, const SketchTiles& other, int64_t first_cell) {
  const int bins = bins_of(s);
  const int64_t end = first_cell + kTileCells;
  if (end > cells_of(s)) return false;
  for (int64_t row = first_cell / s.row_cells; row * s.row_cells < end; ++row)
    if (s.counts[row] <= bins || other.counts[row] <= bins) return false;
  return true;
}

// Brings a counting cell, whose column starts at `column`, to a coarser level.
void coarsen_cell(uint16_t* column, int min, int max, int to_level, int log2_bins) {
  const int level = level_of(min, max, log2_bins), bins = 1 << log2_bins;
  if (level == to_level) return;
  uint16_t own[kMaxBins], coarser[kMaxBins] = {};
  read_column(column, bins, own);
  rescale(own, min, max, level, to_level, bins, coarser);
  write_column(column, bins, coarser);
}

// A tile where everything counts: the few cells whose level rises go one by one, and then the counters just add.
void merge_counting_tile(const SketchTiles& s, const SketchTiles& other, int64_t first_cell) {
  const int size = bins_of(s) * kTileCells;
  uint16_t* to = column_of(s, first_cell);
  uint16_t from[kMaxBins * kTileCells];
  std::copy_n(column_of(other, first_cell), size, from);
  for (int i = 0; i < kTileCells; ++i) {
    const int64_t c = first_cell + i;
    const int min = std::min(s.minimum[c], other.minimum[c]), max = std::max(s.maximum[c], other.maximum[c]);
    const int level = level_of(min, max, s.log2_bins);
    coarsen_cell(to + i, s.minimum[c], s.maximum[c], level, s.log2_bins);
    coarsen_cell(from + i, other.minimum[c], other.maximum[c], level, s.log2_bins);
    s.minimum[c] = static_cast<int16_t>(min);
    s.maximum[c] = static_cast<int16_t>(max);
  }
  for (int i = 0; i < size; ++i) to[i] = static_cast<uint16_t>(to[i] + from[i]);
}

}  // namespace

void sketch_update(const SketchTiles& sketch, int32_t* counts, const CodeWindow& window, int threads) {
  const int64_t planned = std::max<int64_t>(1, kTilesPerTask * kTileCells / sketch.row_cells);
  RowBlocks(window.rows, window.size, sketch.row_cells, planned).each_thread(threads, [&](const auto& next) {
    for (int64_t begin, end; next(begin, end);) BKD_CALL(sketch_block, sketch, counts, window, begin, end);
  });
}

void sketch_sort(const SketchTiles& sketch, int threads) {
  const int bins = bins_of(sketch);
  each_cell(sketch, threads, [&](int64_t cell, int count) {
    if (count > bins) return;
    uint16_t codes[kMaxBins];
    read_column(column_of(sketch, cell), count, codes);
    sort_codes(codes, count);
    write_column(column_of(sketch, cell), count, codes);
  });
}

void sketch_quantile(const SketchTiles& sketch, double q, int32_t* lower, int32_t* upper, float* point, int threads) {
  const int bins = bins_of(sketch);
  each_cell(sketch, threads, [&](int64_t cell, int count) {
    uint16_t own[kMaxBins];
    read_column(column_of(sketch, cell), std::min(count, bins), own);
    const CodeQuantile found = quantile_of(own, count, sketch.minimum[cell], sketch.maximum[cell], sketch.log2_bins, q);
    lower[cell] = found.lower;
    upper[cell] = found.upper;
    point[cell] = found.point;
  });
}

void sketch_histogram(const SketchTiles& sketch, int64_t begin, int64_t end, const int16_t* least, const int16_t* most,
                      int32_t* counts, int threads) {
  const int bins = bins_of(sketch);
  const int64_t cells = (end - begin) * sketch.row_cells, first = begin * sketch.row_cells;
  const int64_t per_task = kTilesPerTask * kTileCells;
  parallel_for((cells + per_task - 1) / per_task, threads, [&](int64_t task) {
    for (int64_t i = task * per_task; i < std::min(cells, (task + 1) * per_task); ++i) {
      const int64_t cell = first + i;
      uint16_t own[kMaxBins], at_level[kMaxBins] = {};
      const int count = sketch.counts[cell / sketch.row_cells];
      read_column(column_of(sketch, cell), std::min(count, bins), own);
      histogram_of(own, count, sketch.minimum[cell], sketch.maximum[cell], sketch.log2_bins, least[i], most[i], at_level,
                   counts + i * bins);
    }
  });
}

void sketch_merge(const SketchTiles& sketch, const SketchTiles& other, int threads) {
  const int64_t tiles = tiles_of(sketch), cells = cells_of(sketch);
  parallel_for((tiles + kTilesPerTask - 1) / kTilesPerTask, threads, [&](int64_t task) {
    for (int64_t tile = task * kTilesPerTask; tile < std::min(tiles, (task + 1) * kTilesPerTask); ++tile) {
      const int64_t first = tile * kTileCells, end = std::min(cells, first + kTileCells);
      if (counts_everywhere(sketch, other, first)) {
        merge_counting_tile(sketch, other, first);
      } else {
        for (int64_t c = first; c < end; ++c)
          merge_cell(sketch, other, c, sketch.counts[c / sketch.row_cells], other.counts[c / sketch.row_cells]);
      }
    }
  });
}

void sketch_deviance_quantile(const SketchTiles& sketch, const double* level, float* out, int threads) {
  const std::vector<float>& probability = probability_of_codes();
  const int bins = bins_of(sketch);
  const int64_t rows_per_task = std::max<int64_t>(1, kTilesPerTask * kTileCells / sketch.row_cells);
  parallel_for((sketch.rows + rows_per_task - 1) / rows_per_task, threads, [&](int64_t task) {
    std::vector<double> weight(kCodes, 0.0);  // of every code: -2 log p falls with the code, so codes are its scale
    for (int64_t row = task * rows_per_task; row < std::min(sketch.rows, (task + 1) * rows_per_task); ++row) {
      const int count = sketch.counts[row];
      if (count == 0) {
        out[row] = std::numeric_limits<float>::quiet_NaN();
        continue;
      }
      double total = 0;
      int least = kCodeMax, most = kCodeMin;
      for (int64_t cell = row * sketch.row_cells; cell < (row + 1) * sketch.row_cells; ++cell) {
        uint16_t own[kMaxBins];
        read_column(column_of(sketch, cell), std::min(count, bins), own);
        each_code(own, count, sketch.minimum[cell], sketch.maximum[cell], sketch.log2_bins, [&](int code, double draws) {
          const double w = draws * static_cast<double>(probability[static_cast<size_t>(code - kCodeMin)]);
          weight[static_cast<size_t>(code - kCodeMin)] += w;
          total += w;
          least = std::min(least, code);
          most = std::max(most, code);
        });
      }
      double above = 0;
      int code = most;
      for (; code > least; --code) {
        above += weight[static_cast<size_t>(code - kCodeMin)];
        if (above >= level[row] * total) break;
      }
      out[row] = deviance_of(code);
      std::fill(weight.begin() + (least - kCodeMin), weight.begin() + (most - kCodeMin) + 1, 0.0);
    }
  });
}

}  // namespace bkd
