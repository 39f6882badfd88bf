// Reading and merging sketches cell by cell: compiled once, for it is rare beside the updates.
#include "cpu/sketch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/parallel.h"

namespace bkd {
namespace {

constexpr int64_t kTilesPerTask = 64;

int64_t cells_of(const SketchTiles& s) { return s.rows * s.row_cells; }
int64_t tiles_of(const SketchTiles& s) { return (cells_of(s) + kTileCells - 1) / kTileCells; }
int bins_of(const SketchTiles& s) { return 1 << s.log2_bins; }

uint16_t* column_of(const SketchTiles& s, int64_t cell) {
  return s.counters + cell / kTileCells * bins_of(s) * kTileCells + cell % kTileCells;
}

void read_column(const uint16_t* column, int count, uint16_t* out) {
  for (int i = 0; i < count; ++i) out[i] = column[i * kTileCells];
}

void write_column(uint16_t* column, int count, const uint16_t* values) {
  for (int i = 0; i < count; ++i) column[i * kTileCells] = values[i];
}

void sort_codes(uint16_t* codes, int count) {
  std::sort(codes, codes + count, [](uint16_t a, uint16_t b) { return static_cast<int16_t>(a) < static_cast<int16_t>(b); });
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

// Adds a cell's draws to counters at `level`, which is not finer than the cell's own.
void add_at_level(const SketchTiles& s, int64_t cell, int count, int level, uint16_t* counters) {
  const int bins = bins_of(s);
  uint16_t own[kMaxBins];
  if (count <= bins) {
    read_column(column_of(s, cell), count, own);
    for (int i = 0; i < count; ++i) ++counters[slot_of(static_cast<int16_t>(own[i]), level, bins)];
  } else {
    read_column(column_of(s, cell), bins, own);
    const int min = s.minimum[cell], max = s.maximum[cell];
    rescale(own, min, max, level_of(min, max, s.log2_bins), level, bins, counters);
  }
}

void merge_cell(const SketchTiles& s, const SketchTiles& other, int64_t cell, int count, int other_count) {
  if (other_count == 0) return;
  const int bins = bins_of(s);
  const int min = std::min(s.minimum[cell], other.minimum[cell]), max = std::max(s.maximum[cell], other.maximum[cell]);
  uint16_t merged[kMaxBins] = {};
  if (count + other_count <= bins) {
    read_column(column_of(s, cell), count, merged);
    read_column(column_of(other, cell), other_count, merged + count);
    sort_codes(merged, count + other_count);
  } else {
    const int level = level_of(min, max, s.log2_bins);
    add_at_level(s, cell, count, level, merged);
    add_at_level(other, cell, other_count, level, merged);
  }
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

// Whether both tiles count already, at one and the same level before and after: then counters just add.
bool adds_plainly(const SketchTiles& s, const SketchTiles& other, int64_t first_cell) {
  const int bins = bins_of(s);
  const int64_t end = first_cell + kTileCells;
  if (end > cells_of(s)) return false;
  for (int64_t row = first_cell / s.row_cells; row * s.row_cells < end; ++row)
    if (s.counts[row] <= bins || other.counts[row] <= bins) return false;
  for (int64_t c = first_cell; c < end; ++c) {
    const int level = level_of(s.minimum[c], s.maximum[c], s.log2_bins);
    const int min = std::min(s.minimum[c], other.minimum[c]), max = std::max(s.maximum[c], other.maximum[c]);
    if (level != level_of(other.minimum[c], other.maximum[c], s.log2_bins) || level != level_of(min, max, s.log2_bins))
      return false;
  }
  return true;
}

}  // namespace

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
    if (count == 0) {
      lower[cell] = upper[cell] = 0;
      point[cell] = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    const int rank = std::clamp(static_cast<int>(std::ceil(q * count)), 1, count);
    uint16_t own[kMaxBins];
    if (count <= bins) {
      read_column(column_of(sketch, cell), count, own);
      sort_codes(own, count);
      const int code = static_cast<int16_t>(own[rank - 1]);
      lower[cell] = upper[cell] = code;
      point[cell] = static_cast<float>(code);
      return;
    }
    read_column(column_of(sketch, cell), bins, own);
    const int min = sketch.minimum[cell], max = sketch.maximum[cell], level = level_of(min, max, sketch.log2_bins);
    int bin = min >> level, below = 0;
    while (below + own[bin & (bins - 1)] < rank) below += own[bin++ & (bins - 1)];
    const int first = std::max(bin * (1 << level), min), last = std::min((bin + 1) * (1 << level) - 1, max);
    lower[cell] = first;
    upper[cell] = last;
    const double share = (rank - below - .5) / own[bin & (bins - 1)];  // of the bin's draws, taken as evenly spread
    point[cell] = static_cast<float>(first - .5 + share * (last - first + 1));
  });
}

void sketch_merge(const SketchTiles& sketch, const SketchTiles& other, int threads) {
  const int64_t tiles = tiles_of(sketch), cells = cells_of(sketch);
  const int bins = bins_of(sketch);
  parallel_for((tiles + kTilesPerTask - 1) / kTilesPerTask, threads, [&](int64_t task) {
    for (int64_t tile = task * kTilesPerTask; tile < std::min(tiles, (task + 1) * kTilesPerTask); ++tile) {
      const int64_t first = tile * kTileCells, end = std::min(cells, first + kTileCells);
      if (adds_plainly(sketch, other, first)) {
        uint16_t* to = column_of(sketch, first);
        const uint16_t* from = column_of(other, first);
        for (int i = 0; i < bins * kTileCells; ++i) to[i] = static_cast<uint16_t>(to[i] + from[i]);
        for (int64_t c = first; c < end; ++c) {
          sketch.minimum[c] = std::min(sketch.minimum[c], other.minimum[c]);
          sketch.maximum[c] = std::max(sketch.maximum[c], other.maximum[c]);
        }
      } else {
        for (int64_t c = first; c < end; ++c)
          merge_cell(sketch, other, c, sketch.counts[c / sketch.row_cells], other.counts[c / sketch.row_cells]);
      }
    }
  });
}

void sketch_deviance_quantile(const SketchTiles& sketch, double level, float* out, int threads) {
  constexpr int kPoints = 8;  // of a bin
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
      const auto add = [&](double code, double draws) {
        const int bucket = std::clamp(static_cast<int>(std::lrint(code)), kCodeMin, kCodeMax);
        const double w = draws * static_cast<double>(probability[static_cast<size_t>(bucket - kCodeMin)]);
        weight[static_cast<size_t>(bucket - kCodeMin)] += w;
        total += w;
        least = std::min(least, bucket);
        most = std::max(most, bucket);
      };
      for (int64_t cell = row * sketch.row_cells; cell < (row + 1) * sketch.row_cells; ++cell) {
        uint16_t own[kMaxBins];
        if (count <= bins) {
          read_column(column_of(sketch, cell), count, own);
          for (int i = 0; i < count; ++i) add(static_cast<int16_t>(own[i]), 1);
          continue;
        }
        read_column(column_of(sketch, cell), bins, own);
        const int min = sketch.minimum[cell], max = sketch.maximum[cell], e = level_of(min, max, sketch.log2_bins);
        for (int bin = min >> e; bin <= max >> e; ++bin) {
          const int draws = own[bin & (bins - 1)];
          if (draws == 0) continue;
          const int first = std::max(bin * (1 << e), min), last = std::min((bin + 1) * (1 << e) - 1, max);
          for (int i = 0; i < kPoints; ++i)
            add(first - .5 + (i + .5) / kPoints * (last - first + 1), static_cast<double>(draws) / kPoints);
        }
      }
      double above = 0;
      int code = most;
      for (; code > least; --code) {
        above += weight[static_cast<size_t>(code - kCodeMin)];
        if (above >= level * total) break;
      }
      out[row] = static_cast<float>(2 * std::log1p(std::exp(-code / static_cast<double>(kCodesPerLogit))));
      std::fill(weight.begin() + (least - kCodeMin), weight.begin() + (most - kCodeMin) + 1, 0.0);
    }
  });
}

}  // namespace bkd
