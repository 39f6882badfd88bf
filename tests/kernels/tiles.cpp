// csrc/cuda/predictive.cu in plain C++: a block's lanes one after the other between its barriers. What a lane does to its cells
// is the kernel's own code (csrc/tile.h); this file stands in for the grid, the shuffles and the copies. For a test.
#include <cstring>
#include <memory>
#include <vector>

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
void update(const PredictiveState& state, const PredictiveWindow& window, int64_t chunk) {
  constexpr int bins = 1 << log2_bins;
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
    for (int64_t i = begin; i < end; ++i) finish_row(state, window, statistics, sums.data() + (i - begin) * per_row, i);
  }
}

}  // namespace

// rows are updated `chunk` at a time, as the launcher does to keep logits in the cache.
extern "C" void update_tiles(const float* logits, int64_t draw_stride, int32_t draws, const int64_t* rows, const int64_t* batch,
                             int64_t size, int64_t chunk, uint16_t* counters, int16_t* minimum, int16_t* maximum, float* mean,
                             float* m2, float* reference, int32_t* counts, int32_t* invalid, double* entropy,
                             double* divergence, int64_t num_rows, int32_t classes, int32_t bins) {
  const PredictiveState state{counters, minimum, maximum, mean,       m2,       reference, counts,
                              invalid,  entropy, divergence, num_rows, classes,   log2_of(bins)};
  const PredictiveWindow window{logits, draw_stride, draws, rows, batch, size};
  if (bins == 64)
    classes % 2 == 0 ? update<true, 6>(state, window, chunk) : update<false, 6>(state, window, chunk);
  else
    classes % 2 == 0 ? update<true, 7>(state, window, chunk) : update<false, 7>(state, window, chunk);
}
