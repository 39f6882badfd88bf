// One cell of the dyadic logit histogram: the code of a logit, and the level, slots and rescaling of its counters.
//
// A code is rint(1024 logit) as int16. A cell holds `bins` counters (a power of two) and the least and greatest code
// seen; its level is the least e with (max >> e) - (min >> e) < bins, so that codes min..max fall in distinct slots
// (code >> e) & (bins - 1). The level follows from min and max alone, and raising it adds counters pairwise: the state
// depends on the multiset of codes, never on their order. The first `bins` codes of a cell are kept as they are.
#pragma once
#include "common.h"

namespace bkd {

constexpr float kCodesPerLogit = 1024.0f;
constexpr int kCodeMin = -32768, kCodeMax = 32767;
constexpr int kMaxBins = 128;

// Counters lie in tiles [bins][64 cells]: a vector holds one slot of many cells, a GPU lane owns two cells of a word.
constexpr int kTileCells = 64;

BKD_HD int code_of(float logit) {
  const float scaled = logit * kCodesPerLogit;
  const float high = scaled < (float)kCodeMax ? scaled : (float)kCodeMax;
  const float clamped = high > (float)kCodeMin ? high : (float)kCodeMin;
  const float magic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded value, ties to even
  return (int)(int16_t)as_bits(clamped + magic);
}

BKD_HD int log2_of(int power_of_two) {
  int e = 0;
  while (power_of_two >> (e + 1)) ++e;
  return e;
}

// bins = 1 << log2_bins
BKD_HD int level_of(int min, int max, int log2_bins) {
  const int range = max - min;
  const int bit_length = (int)(as_bits((float)range) >> 23) - 126;  // exact below 2^24; hugely negative for 0
  const int guess = bit_length > log2_bins ? bit_length - log2_bins : 0;
  // a range of that many bits may straddle one slot more
  return guess + ((max >> guess) - (min >> guess) > (1 << log2_bins) - 1 ? 1 : 0);
}

BKD_HD int slot_of(int code, int level, int bins) { return (code >> level) & (bins - 1); }

// The slots of one cell in a tile, as if they lay side by side.
struct Column {
  uint16_t* first;

  BKD_MEMBER uint16_t& operator[](int slot) const { return first[slot * kTileCells]; }
};

// Adds the counters of a cell with codes min..max at `level` to counters at the coarser `to_level`. From and To: a Column or a
// pointer.
template <class From, class To>
BKD_HD void rescale(From counters, int min, int max, int level, int to_level, int bins, To to) {
  for (int bin = min >> level; bin <= max >> level; ++bin) {
    uint16_t& target = to[(bin >> (to_level - level)) & (bins - 1)];
    target = (uint16_t)(target + counters[bin & (bins - 1)]);
  }
}

// Adds a cell's draws to counters at `level`, which is not finer than the cell's own.
template <class From, class To>
BKD_HD void add_at_level(From cell, int count, int min, int max, int log2_bins, int level, To to) {
  const int bins = 1 << log2_bins;
  if (count > bins) return rescale(cell, min, max, level_of(min, max, log2_bins), level, bins, to);
  for (int i = 0; i < count; ++i) {
    uint16_t& target = to[slot_of((int16_t)cell[i], level, bins)];
    target = (uint16_t)(target + 1);
  }
}

}  // namespace bkd
