// csrc/cuda/predictive.cu in plain C++: a block's lanes one after the other between its barriers. What a lane does to its cells
// is the kernel's own code (csrc/tile.h); this file stands in for the grid, the shuffles and the copies. And of
// csrc/cuda/sketch.cu what adds codes (csrc/sketch.h). For a test.
#include <cstring>
#include <memory>
#include <vector>

#include "sketch.h"
#include "tile.h"

namespace {

using namespace bkd;

float sum_of(const float* lane) {
  float sum[kSumLanes];
  memcpy(sum, lane, sizeof sum);
  for (int half = kSumLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  return sum[0];
}

DrawStatistics measure(const float* row, int classes) {
  const int lanes = classes <= kShortRow ? 1 : kSumLanes;
  float maximum = -__builtin_inff(), rest[kSumLanes] = {}, weighted[kSumLanes] = {}, ties[kSumLanes] = {};
  for (int c = 0; c < classes; ++c) maximum = __builtin_fmaxf(maximum, row[c]);
  for (int c = 0; c < classes; ++c) add_class(row[c], maximum, rest[c % lanes], weighted[c % lanes], ties[c % lanes]);
  const RowStatistics of = statistics_of({maximum, sum_of(rest), sum_of(weighted), sum_of(ties)});
  return {of.maximum, of.total, of.rest, of.inverse_total, of.log_total, of.valid, of.entropy, 0};
}

template <bool one_row, int log2_bins>
void update(const PredictiveState& state, const PredictiveWindow& window, const PickedCodes& picked, int64_t chunk) {
  constexpr int bins = log2_bins > 0 ? 1 << log2_bins : 0;
  const int per_row = tiles_per_row(state.classes);
  for (int64_t begin = 0; begin < window.size; begin += chunk) {
    const int64_t end = begin + chunk < window.size ? begin + chunk : window.size;
    std::vector<DrawStatistics> table((size_t)(window.draws * (end - begin)));
    const StatisticsTable statistics{table.data(), begin, end - begin};
    for (int w = 0; w < window.draws; ++w)
      for (int64_t i = begin; i < end; ++i)
        statistics.at(w, i) = measure(window.logits + w * window.draw_stride + window.batch[i] * state.classes, state.classes);
    std::vector<double> sums((size_t)((end - begin) * per_row), -1e300);  // what is not written must not be read

    for (int64_t block = 0; block < (end - begin) * per_row; ++block) {
      TilePlace place;
      if (!owns_tile(state, window, begin, end, begin + block / per_row, (int)(block % per_row), place)) continue;
      uint16_t* tile = state.counters + place.tile * (bins * kTileCells);
      std::vector<uint16_t> shared(tile, tile + bins * kTileCells);
      float divergence[kTileCells];
      // a lane may use its cells in memory as room while it works, never another's: last lane first, to show it
      for (int lane = kLanesPerTile - 1; lane >= 0; --lane) {
        Lane<one_row, log2_bins> cells(state, window, statistics, place, lane, shared.data());
        if (cells.present()) cells.take_draws();
        divergence[2 * lane] = cells.cell[0].divergence;
        divergence[2 * lane + 1] = cells.cell[1].divergence;
      }
      memcpy(tile, shared.data(), shared.size() * sizeof(uint16_t));
      const int last = (place.offset + kTileCells - 1) / state.classes;
      for (int nth = 0; nth <= last; ++nth) {
        const int64_t row = find_row(window, place, nth);
        if (row < 0) continue;
        double part[kSumParts];
        for (int k = 0; k < kSumParts; ++k) part[k] = sum_part(divergence, place, state.classes, nth, k);
        sums[(size_t)((row - begin) * per_row + (place.tile - window.rows[row] * state.classes / kTileCells))] =
            (part[0] + part[1]) + (part[2] + part[3]);
      }
    }
    for (int w = 0; w < window.draws; ++w)
      for (int64_t i = begin; i < end; ++i)
        for (int nth = 0; nth < picked.picks; ++nth) pick_code(state, window, picked, statistics, w, i, nth);
    for (int64_t i = begin; i < end; ++i) finish_row(state, window, statistics, sums.data() + (i - begin) * per_row, i);
  }
}

}  // namespace

// rows are updated `chunk` at a time, as the launcher does to keep logits in the cache.
extern "C" void update_tiles(const float* logits, int64_t draw_stride, int32_t draws, const int64_t* rows, const int64_t* batch,
                             int64_t size, int64_t chunk, uint16_t* counters, int16_t* minimum, int16_t* maximum, float* mean,
                             float* m2, float* reference, int32_t* counts, int32_t* invalid, double* entropy,
                             double* divergence, int64_t num_rows, int32_t classes, int32_t bins, const int32_t* classes_picked,
                             int32_t picks, int16_t* codes, uint8_t* valid) {
  const PredictiveState state{counters, minimum, maximum, mean,       m2,       reference, counts,
                              invalid,  entropy, divergence, num_rows, classes,   log2_of(bins)};
  const PredictiveWindow window{logits, draw_stride, draws, rows, batch, size};
  const PickedCodes picked{classes_picked, picks, codes, valid};
  const bool even = classes % 2 == 0;
  if (!counters)
    even ? update<true, 0>(state, window, picked, chunk) : update<false, 0>(state, window, picked, chunk);
  else if (bins == 64)
    even ? update<true, 6>(state, window, picked, chunk) : update<false, 6>(state, window, picked, chunk);
  else
    even ? update<true, 7>(state, window, picked, chunk) : update<false, 7>(state, window, picked, chunk);
}

// Threads of csrc/cuda/sketch.cu's update_cells, last one first; counts are brought up to date after all.
extern "C" void update_cells(uint16_t* counters, int16_t* minimum, int16_t* maximum, int32_t* counts, int64_t num_rows,
                             int64_t row_cells, int32_t bins, const int16_t* codes, const uint8_t* valid, int32_t draws,
                             const int64_t* rows, int64_t size) {
  for (int64_t at = size * row_cells - 1; at >= 0; --at) {
    const int64_t i = at / row_cells;
    if (rows[i] >= num_rows) continue;
    const int64_t cell = rows[i] * row_cells + (at - i * row_cells);
    const Column column{counters + cell / kTileCells * (kTileCells * bins) + cell % kTileCells};
    int min = minimum[cell], max = maximum[cell];
    uint16_t copy[kMaxBins];
    for (int slot = 0; slot < bins; ++slot) copy[slot] = column[slot];
    const int taken = add_codes_to(
        copy, counts[rows[i]], min, max, log2_of(bins), draws, [&](int w) { return (int)codes[w * size * row_cells + at]; },
        [&](int w) { return !valid || valid[w * size + i]; }, column);
    if (taken == 0) continue;
    for (int slot = 0; slot < bins; ++slot) column[slot] = copy[slot];
    minimum[cell] = (int16_t)min;
    maximum[cell] = (int16_t)max;
  }
  for (int64_t i = 0; i < size; ++i)
    for (int w = 0; rows[i] < num_rows && w < draws; ++w) counts[rows[i]] += !valid || valid[w * size + i];
}
