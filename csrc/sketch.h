// Reading, sorting and merging one cell of the dyadic logit histogram (histogram.h). A cell is anything that gives its slots by
// index: a Column of a tile, or a pointer.
#pragma once
#include "histogram.h"
#ifndef __CUDACC_RTC__
#include <math.h>
#endif

namespace bkd {

// Ascending, in place: Shell's sort, which for a cell's few codes is as fast as any and needs no memory.
template <class Cell> BKD_HD void sort_codes(Cell codes, int count) {
  for (int gap = 57; gap > 0; gap = gap * 4 / 9)  // 57, 25, 11, 4, 1
    for (int i = gap; i < count; ++i) {
      const uint16_t code = codes[i];
      int at = i;
      for (; at >= gap && (int16_t)codes[at - gap] > (int16_t)code; at -= gap) codes[at] = codes[at - gap];
      codes[at] = code;
    }
}

// The code of this rank (from 1 on) among codes in any order, by bisection over the codes' range: nothing is moved.
template <class Cell> BKD_HD int code_of_rank(Cell codes, int count, int rank) {
  int least = kCodeMin, most = kCodeMax;
  while (least < most) {
    const int middle = (least + most) >> 1;
    int below = 0;
    for (int i = 0; i < count; ++i) below += (int16_t)codes[i] <= middle;
    if (below >= rank)
      most = middle;
    else
      least = middle + 1;
  }
  return least;
}

// An order statistic: it lies in codes lower..upper (inclusive), and `point` interpolates there.
struct CodeQuantile {
  int lower, upper;
  float point;
};

// The first and last code that a bin of a cell with codes min..max may hold.
BKD_HD int first_code(int bin, int level, int min) {
  const int code = bin * (1 << level);
  return code > min ? code : min;
}
BKD_HD int last_code(int bin, int level, int max) {
  const int code = (bin + 1) * (1 << level) - 1;
  return code < max ? code : max;
}

// The order statistic ceil(q n) of a cell's n = count draws. Without draws lower = upper = 0 and point is NaN.
template <class Cell> BKD_HD CodeQuantile quantile_of(Cell cell, int count, int min, int max, int log2_bins, double q) {
  if (count == 0) return {0, 0, as_float(0x7FC00000u)};
  const int bins = 1 << log2_bins, ceiling = (int)ceil(q * count);
  const int rank = ceiling < 1 ? 1 : ceiling > count ? count : ceiling;
  if (count <= bins) {
    const int code = code_of_rank(cell, count, rank);
    return {code, code, (float)code};
  }
  const int level = level_of(min, max, log2_bins);
  int bin = min >> level, below = 0;
  while (below + cell[bin & (bins - 1)] < rank) below += cell[bin++ & (bins - 1)];
  const int first = first_code(bin, level, min), last = last_code(bin, level, max);
  const double share = (rank - below - .5) / cell[bin & (bins - 1)];  // of the bin's draws, taken as evenly spread
  return {first, last, (float)(first - .5 + share * (last - first + 1))};
}

// The codes of both cells go into `merged`, all zeros before; least and most are of both. Pooled counts stay below 65536.
template <class Cell, class Merged>
BKD_HD void merge_cells(Cell a, int count_a, int min_a, int max_a, Cell b, int count_b, int min_b, int max_b,
                        int least, int most, int log2_bins, Merged merged) {
  if (count_a + count_b <= 1 << log2_bins) {
    for (int i = 0; i < count_a; ++i) merged[i] = a[i];
    for (int i = 0; i < count_b; ++i) merged[count_a + i] = b[i];
    sort_codes(merged, count_a + count_b);
    return;
  }
  const int level = level_of(least, most, log2_bins);
  add_at_level(a, count_a, min_a, max_a, log2_bins, level, merged);
  add_at_level(b, count_b, min_b, max_b, log2_bins, level, merged);
}

// The draws of a cell at the level of codes least..most, which hold its own, in order from the bin of `least` on. at_level: room,
// all zeros before.
template <class Cell, class Room>
BKD_HD void histogram_of(Cell cell, int count, int min, int max, int log2_bins, int least, int most, Room at_level,
                         int32_t* counts) {
  const int bins = 1 << log2_bins, level = level_of(least, most, log2_bins), first = least >> level;
  if (count) add_at_level(cell, count, min, max, log2_bins, level, at_level);
  for (int i = 0; i < bins; ++i) counts[i] = at_level[(first + i) & (bins - 1)];
}

// Adds a window of codes to a cell: code_of_draw(w) where is_valid(w). room: another column, which may be written. Gives the
// number of draws taken.
template <class Cell, class Room, class Code, class Valid>
BKD_HD int add_codes_to(Cell cell, int count, int& min, int& max, int log2_bins, int draws, const Code& code_of_draw,
                        const Valid& is_valid, Room room) {
  const int bins = 1 << log2_bins;
  int least = min, most = max, taken = 0;
  for (int w = 0; w < draws; ++w)
    if (is_valid(w)) {
      const int code = code_of_draw(w);
      least = code < least ? code : least;
      most = code > most ? code : most;
      ++taken;
    }
  if (count + taken <= bins) {
    int at = count;
    for (int w = 0; w < draws; ++w)
      if (is_valid(w)) cell[at++] = (uint16_t)code_of_draw(w);
  } else {
    const int level = level_of(least, most, log2_bins);
    if (count <= bins || level != level_of(min, max, log2_bins)) {
      for (int slot = 0; slot < bins; ++slot) room[slot] = 0;
      add_at_level(cell, count, min, max, log2_bins, level, room);
      for (int slot = 0; slot < bins; ++slot) cell[slot] = room[slot];
    }
    for (int w = 0; w < draws; ++w)
      if (is_valid(w)) {
        uint16_t& counter = cell[slot_of(code_of_draw(w), level, bins)];
        counter = (uint16_t)(counter + 1);
      }
  }
  min = least;
  max = most;
  return taken;
}

constexpr int kPointsPerBin = 8;  // that stand for a bin's draws, evenly spread over it

// f(code, draws) for every code that the cell keeps, or for the points of its bins.
template <class Cell, class F>
BKD_HD void each_code(Cell cell, int count, int min, int max, int log2_bins, const F& f) {
  const int bins = 1 << log2_bins;
  if (count <= bins) {
    for (int i = 0; i < count; ++i) f((int)(int16_t)cell[i], 1.0);
    return;
  }
  const int level = level_of(min, max, log2_bins);
  for (int bin = min >> level; bin <= max >> level; ++bin) {
    const int draws = cell[bin & (bins - 1)];
    if (draws == 0) continue;
    const int first = first_code(bin, level, min), width = last_code(bin, level, max) - first + 1;
    for (int i = 0; i < kPointsPerBin; ++i) {
      const int code = (int)lrint(first - .5 + (i + .5) / kPointsPerBin * width);
      f(code < kCodeMin ? kCodeMin : code > kCodeMax ? kCodeMax : code, (double)draws / kPointsPerBin);
    }
  }
}

// -2 log p of a code.
BKD_HD float deviance_of(int code) { return (float)(2 * log1p(exp(-code / (double)kCodesPerLogit))); }

}  // namespace bkd
