// The posterior predictive's update of one block of rows, in two stages: softmax statistics of every (draw, row), then
// tiles of 64 cells over all draws: codes, moments, divergence from the reference, and the histogram by compare-and-add.
//
// Both stages do the same operations in the same order on every instruction set (sums over classes run in sixteen lanes,
// or in one per row), so that codes and moments are the same bits everywhere.
#include "cpu/predictive.h"

#include "../predictive.h"
#include "cpu/tile_codes.h"

namespace bkd {
namespace BKD_ISA {

constexpr int64_t kChunkBytes = 128 * 1024;    // of logits between the two stages: read from memory once
constexpr int kMaxTileRows = kTileCells / 2 + 1;  // with two classes or more
constexpr int kTileRowStride = kMaxTileRows + kScratchPadding;
constexpr float kInfinity = __builtin_inff();

// The statistics of every draw and row of a block or of one tile.
struct Statistics {
  float* data;  // [kStatistics][draws][stride]
  int64_t stride;
  int draws;

  float* at(Statistic which, int draw, int64_t row) const { return data + ((int64_t)which * draws + draw) * stride + row; }
};

// ---- stage 1: statistics of every draw and row ----

BKD_INLINE Floats load_classes(const float* x, int left) {
  return left >= kLanes ? load(x) : left > 0 ? load(x, first(left), set1(-kInfinity)) : set1(-kInfinity);
}

// Rows of many classes: sixteen lanes of classes, then one fixed tree.
struct Sixteen {
  Floats part[kSumLanes / kLanes];
};

BKD_INLINE float sum_of(const Sixteen& s) {
#if defined(BKD_ISA_avx512)
  const __m256 low = _mm512_castps512_ps256(s.part[0]), high = _mm512_extractf32x8_ps(s.part[0], 1);
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#elif defined(BKD_ISA_avx2)
  return reduce_add(add(s.part[0], s.part[1]));
#else
  float lane[kSumLanes];
  for (int i = 0; i < kSumLanes; ++i) lane[i] = s.part[i].x;
  for (int half = kSumLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] + lane[i + half];
  return lane[0];
#endif
}

static float maximum_of(const float* x, int classes) {
  Floats most = set1(-kInfinity), most_odd = most;
  int c = 0;
  for (; c + 2 * kLanes <= classes; c += 2 * kLanes) {
    most = max(most, load(x + c));
    most_odd = max(most_odd, load(x + c + kLanes));
  }
  for (; c < classes; c += kLanes) most = max(most, load_classes(x + c, classes - c));
  return reduce_max(max(most, most_odd));
}

struct LongRowSums {
  float maximum, rest, weighted, ties;
};

static LongRowSums sums_of_long_row(const float* x, int classes) {
  const float maximum = maximum_of(x, classes);
  constexpr int kParts = kSumLanes / kLanes;
  Sixteen rest, weighted, ties;
  for (int i = 0; i < kParts; ++i) rest.part[i] = weighted.part[i] = ties.part[i] = set1(0.0f);
  const auto accumulate = [&](int i, Floats logits) {
    add_class(logits, set1(maximum), rest.part[i], weighted.part[i], ties.part[i]);
  };
  int c = 0;
  for (; c + kSumLanes <= classes; c += kSumLanes)
    for (int i = 0; i < kParts; ++i) accumulate(i, load(x + c + i * kLanes));
  if (c < classes)
    for (int i = 0; i < kParts; ++i) accumulate(i, load_classes(x + c + i * kLanes, classes - c - i * kLanes));
  return {maximum, sum_of(rest), sum_of(weighted), sum_of(ties)};
}

// kLanes rows of few classes, one per lane; offsets[lane] is where the lane's row starts in x.
static RowSums sums_of_short_rows(const float* x, Ints offsets, int classes) {
  alignas(64) float logits[kShortRow * kLanes];
  Floats maximum = set1(-kInfinity);
  for (int c = 0; c < classes; ++c) {
    const Floats column = gather(x + c, offsets);
    store(logits + c * kLanes, column);
    maximum = max(maximum, column);
  }
  Floats rest = set1(0.0f), weighted = rest, ties = rest;
  for (int c = 0; c < classes; ++c) add_class(load(logits + c * kLanes), maximum, rest, weighted, ties);
  return {maximum, rest, weighted, ties};
}

// Returns the rows' entropies.
BKD_INLINE Floats finish_rows(const Statistics& statistics, int draw, int64_t row, const RowSums& sums) {
  const RowStatistics of = statistics_of(sums);
  store(statistics.at(kMaximum, draw, row), of.maximum);
  store(statistics.at(kTotal, draw, row), of.total);
  store(statistics.at(kRest, draw, row), of.rest);
  store(statistics.at(kInverseTotal, draw, row), of.inverse_total);
  store(statistics.at(kLogTotal, draw, row), of.log_total);
  store(statistics.at(kValid, draw, row), select(of.valid, set1(1.0f), set1(0.0f)));
  return of.entropy;
}

// Statistics of sorted rows [begin, end) of the window, stored from `origin` on; adds the rows' entropies.
static void measure_rows(const PredictiveState& state, const PredictiveWindow& window, int64_t begin, int64_t end,
                         int64_t origin, const Statistics& statistics, int32_t* valid_draws) {
  const int classes = state.classes;
  for (int64_t i = begin; i < end; ++i) valid_draws[i - origin] = 0;
  for (int w = 0; w < window.draws; ++w) {
    const float* logits = window.logits + w * window.draw_stride;
    for (int64_t i = begin; i < end; i += kLanes) {
      const int rows = end - i < kLanes ? (int)(end - i) : kLanes;
      RowSums sums;
      if (classes <= kShortRow) {
        const float* first_row = logits + window.batch[i] * classes;
        int32_t offsets[kLanes];
        for (int lane = 0; lane < kLanes; ++lane)
          offsets[lane] = (int32_t)((window.batch[i + (lane < rows ? lane : 0)] - window.batch[i]) * classes);
        sums = sums_of_short_rows(first_row, load(offsets), classes);
      } else {
        float maximum[kLanes] = {}, rest[kLanes] = {}, weighted[kLanes] = {}, ties[kLanes] = {};
        for (int lane = 0; lane < rows; ++lane) {
          const LongRowSums row = sums_of_long_row(logits + window.batch[i + lane] * classes, classes);
          maximum[lane] = row.maximum;
          rest[lane] = row.rest;
          weighted[lane] = row.weighted;
          ties[lane] = row.ties;
        }
        sums = {load(maximum), load(rest), load(weighted), load(ties)};
      }
      alignas(64) float entropy[kLanes];
      store(entropy, finish_rows(statistics, w, i - origin, sums));
      const float* valid = statistics.at(kValid, w, i - origin);
      for (int lane = 0; lane < rows; ++lane)
        if (valid[lane] != 0.0f) {
          state.entropy[window.rows[i + lane]] += (double)entropy[lane];
          ++valid_draws[i + lane - origin];
        }
    }
  }
}

BKD_INLINE void store_codes(int16_t* codes, Floats logits) {
  store_saturated(codes, round_to_int(mul(logits, set1(kCodesPerLogit))));
}

// The codes of the picked classes of sorted rows [begin, end).
static void pick_codes(int classes, const PredictiveWindow& window, const PickedCodes& picked, int64_t begin, int64_t end,
                       int64_t origin, const Statistics& statistics) {
  for (int w = 0; w < window.draws; ++w)
    for (int64_t i = begin; i < end; ++i) {
      const auto statistic = [&](Statistic which) { return *statistics.at(which, w, i - origin); };
      const int64_t at = w * window.size + i;
      picked.valid[at] = statistic(kValid) != 0.0f;
      const float* logits = window.logits + w * window.draw_stride + window.batch[i] * classes;
      const int32_t* chosen = picked.classes + window.rows[i] * picked.picks;
      for (int first = 0; first < picked.picks; first += kLanes) {
        const int lanes = picked.picks - first < kLanes ? picked.picks - first : kLanes;
        int32_t offsets[kLanes] = {};
        memcpy(offsets, chosen + first, sizeof(int32_t) * (size_t)lanes);
        const CellDraw of = draw_of(gather(logits, load(offsets)), set1(statistic(kMaximum)), set1(statistic(kTotal)),
                                    set1(statistic(kRest)), set1(statistic(kInverseTotal)), set1(statistic(kLogTotal)));
        int16_t codes[kLanes];
        store_codes(codes, logit_of(of));
        memcpy(picked.codes + at * picked.picks + first, codes, sizeof(int16_t) * (size_t)lanes);
      }
    }
}

// ---- stage 2: the cells of one tile ----

// The cells of one row in a tile.
struct Segment : CodeSegment {
  int local_row;  // in the tile's statistics
  int64_t row;    // of the state
};

struct Tile {
  int64_t first_cell;
  const float* logits;  // of the tile's first cell, draw 0
  int64_t draw_stride;
  Statistics statistics;  // local row 0 is the row of the first cell
  bool every_draw_valid;
  int segments;
  Segment segment[kMaxTileRows];
  alignas(64) int32_t local_row[kTileCells];      // of every cell
  alignas(64) float inverse_count[kTileRowStride];  // after this window, of every local row
  alignas(64) float is_new[kTileRowStride];         // 1 where the row had no draw before
};

struct TileBuffers {
  CodeBuffers histogram;
  alignas(64) float divergence[kTileCells];
  alignas(64) float difference[kMaxDraws * kLanes];
  alignas(64) float others[kMaxDraws * kLanes];
  alignas(64) float probability[kMaxDraws * kLanes];
  alignas(64) float log_probability[kMaxDraws * kLanes];
  alignas(64) float logits[kMaxDraws * kTileCells];
  alignas(64) float statistics[kStatistics * kMaxDraws * kTileRowStride];
};

// Codes (where there is a histogram), moments and divergence of kLanes cells over all draws.
template <bool histogram, bool every_draw_valid, bool one_row>
BKD_INLINE void update_cells(const PredictiveState& state, const Tile& tile, int draws, int first, TileBuffers& buffers) {
  const int64_t cell = tile.first_cell + first;
  const int base = tile.local_row[first];
  const Ints row_of_lane = sub(load(tile.local_row + first), set1i(base));
  const auto spread = [&](const float* of_rows) { return one_row ? set1(of_rows[0]) : lookup(of_rows, row_of_lane); };
  const auto statistic = [&](Statistic which, int w) { return spread(tile.statistics.at(which, w, base)); };
  const Floats zero = set1(0.0f), one = set1(1.0f);

  Mask fresh = equal(spread(tile.is_new + base), one);  // cells whose first draw is still to come
  const Mask is_new = fresh;
  Floats shift = load(state.mean + cell), sum = zero, square_sum = zero;
  for (int w = 0; w < draws; ++w) {
    const CellDraw of = draw_of(load(tile.logits + w * tile.draw_stride + first), statistic(kMaximum, w), statistic(kTotal, w),
                                statistic(kRest, w), statistic(kInverseTotal, w), statistic(kLogTotal, w));
    if (histogram) {
      store(buffers.difference + w * kLanes, of.difference);
      store(buffers.others + w * kLanes, of.others);
    }
    const Floats probability = of.probability;
    store(buffers.probability + w * kLanes, probability);
    store(buffers.log_probability + w * kLanes, of.log_probability);
    if (every_draw_valid) {
      if (w == 0) shift = select(fresh, probability, shift);
      const Floats deviation = sub(probability, shift);
      sum = add(sum, deviation);
      square_sum = fma(deviation, deviation, square_sum);
    } else {
      const Mask valid = equal(statistic(kValid, w), one);
      shift = select(mask_and(fresh, valid), probability, shift);
      fresh = mask_and(fresh, mask_not(valid));
      const Floats deviation = select(valid, sub(probability, shift), zero);
      sum = add(sum, deviation);
      square_sum = fma(deviation, deviation, square_sum);
    }
  }
  // a loop of its own: in one with the above, each draw is one long chain of dependent operations
  for (int w = 0; histogram && w < draws; ++w)
    store_codes(buffers.histogram.codes + w * kTileCells + first,
                logit_of(load(buffers.difference + w * kLanes), load(buffers.others + w * kLanes)));

  // Chan's merge of the window into the running moments, both taken about `shift`
  const Floats step = mul(sum, spread(tile.inverse_count + base));
  const Floats mean = add(shift, step);
  store(state.mean + cell, mean);
  store(state.m2 + cell, add(load(state.m2 + cell), fnma(sum, step, square_sum)));

  Floats reference = load(state.reference + cell);
  if (any(is_new)) {
    reference = select(is_new, max(mean, set1(kSmallestReference)), reference);
    store(state.reference + cell, reference);
  }
  const Floats inverse_reference = div(one, reference), log_reference = log_positive(reference);
  Floats divergence = zero;
  for (int w = 0; w < draws; ++w) {
    const Floats term = divergence_term(load(buffers.probability + w * kLanes), load(buffers.log_probability + w * kLanes),
                                        reference, inverse_reference, log_reference);
    divergence = add(divergence, every_draw_valid ? term : select(equal(statistic(kValid, w), one), term, zero));
  }
  store(buffers.divergence + first, mul(divergence, reference));
}

template <bool histogram, bool every_draw_valid>
static void update_tile_cells(const PredictiveState& state, const Tile& tile, int draws, TileBuffers& buffers) {
  for (int first = 0; first < kTileCells; first += kLanes)
    if (tile.local_row[first] == tile.local_row[first + kLanes - 1])
      update_cells<histogram, every_draw_valid, true>(state, tile, draws, first, buffers);
    else
      update_cells<histogram, every_draw_valid, false>(state, tile, draws, first, buffers);
}

template <bool histogram>
static void update_tile(const PredictiveState& state, const Tile& tile, int draws, TileBuffers& buffers) {
  if (tile.every_draw_valid)
    update_tile_cells<histogram, true>(state, tile, draws, buffers);
  else
    update_tile_cells<histogram, false>(state, tile, draws, buffers);
  if (!histogram) return;
  const TileCounters counters{state.counters + (tile.first_cell << state.log2_bins), state.minimum + tile.first_cell,
                              state.maximum + tile.first_cell, state.log2_bins};
  add_codes(counters, tile.segment, tile.segments, draws, buffers.histogram);
}

// Four interleaved sums: one would wait for itself.
static double sum_of_cells(const float* x, int count) {
  double part[4] = {0, 0, 0, 0};
  int j = 0;
  for (; j + 4 <= count; j += 4)
    for (int k = 0; k < 4; ++k) part[k] += (double)x[j + k];
  for (; j < count; ++j) part[j & 3] += (double)x[j];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// The tile of cells first_cell.. as this window sees it; sorted rows [present, end) are those of the batch from its first
// row on. Where a row is missing or has invalid draws, statistics and logits are copied beside each other.
static void describe_tile(const PredictiveState& state, const PredictiveWindow& window, int64_t present, int64_t end,
                          int64_t origin, const Statistics& statistics, const int32_t* valid_draws, Tile& tile,
                          TileBuffers& buffers) {
  const int64_t classes = state.classes, first_cell = tile.first_cell;
  const int64_t first_row = first_cell / classes;
  bool whole = first_cell + kTileCells <= state.rows * classes;
  int64_t index_of[kMaxTileRows];
  int segments = 0;
  for (int cell = 0; cell < kTileCells; ++segments) {
    const int64_t row = first_row + segments, row_end = (row + 1) * classes - first_cell;
    Segment& segment = tile.segment[segments];
    segment.begin = cell;
    segment.end = row_end < kTileCells ? (int)row_end : kTileCells;
    segment.local_row = segments;
    segment.row = row;
    for (; cell < segment.end; ++cell) tile.local_row[cell] = segments;
    const bool here = present < end && window.rows[present] == row;
    index_of[segments] = here ? present++ : -1;
    segment.count = here ? (uint32_t)state.counts[row] : 0;
    segment.valid_draws = here ? valid_draws[index_of[segments] - origin] : 0;
    segment.valid = 0;
    if (segment.valid_draws == window.draws)
      segment.valid = every_of(window.draws);
    else if (here)
      for (int w = 0; w < window.draws; ++w)
        segment.valid |= (uint64_t)(*statistics.at(kValid, w, index_of[segments] - origin) != 0.0f) << w;
    const int count = (int)segment.count + segment.valid_draws;
    tile.inverse_count[segments] = segment.valid_draws > 0 ? 1.0f / (float)count : 0.0f;
    tile.is_new[segments] = segment.valid_draws > 0 && segment.count == 0 ? 1.0f : 0.0f;
    whole = whole && segment.valid_draws == window.draws &&
            window.batch[index_of[segments]] == window.batch[index_of[0]] + segments;
  }
  tile.segments = segments;
  tile.every_draw_valid = whole;
  if (whole) {
    tile.statistics = statistics;
    tile.statistics.data += index_of[0] - origin;
    tile.draw_stride = window.draw_stride;
    tile.logits = window.logits + window.batch[index_of[0]] * classes + (first_cell - first_row * classes);
    return;
  }
  tile.statistics = {buffers.statistics, kTileRowStride, window.draws};
  tile.draw_stride = kTileCells;
  tile.logits = buffers.logits;
  memset(buffers.statistics, 0, sizeof(float) * (size_t)(kStatistics * window.draws * kTileRowStride));
  memset(buffers.logits, 0, sizeof(float) * (size_t)(window.draws * kTileCells));
  for (int i = 0; i < segments; ++i) {
    if (index_of[i] < 0) continue;
    const Segment& segment = tile.segment[i];
    const int64_t offset = window.batch[index_of[i]] * classes + first_cell + segment.begin - segment.row * classes;
    for (int w = 0; w < window.draws; ++w) {
      memcpy(buffers.logits + w * kTileCells + segment.begin, window.logits + w * window.draw_stride + offset,
             sizeof(float) * (size_t)(segment.end - segment.begin));
      for (int which = 0; which < kStatistics; ++which)
        *tile.statistics.at((Statistic)which, w, i) = *statistics.at((Statistic)which, w, index_of[i] - origin);
    }
  }
}

void predictive_block(const PredictiveState& state, const PredictiveWindow& window, const PickedCodes& picked, int64_t begin,
                      int64_t end, int64_t row_capacity, float* scratch) {
  const Statistics statistics{scratch, row_capacity, window.draws};
  int32_t* valid_draws = (int32_t*)(scratch + (int64_t)kStatistics * window.draws * row_capacity);
  const int64_t classes = state.classes;
  int64_t chunk = kChunkBytes / ((int64_t)sizeof(float) * window.draws * classes);
  chunk = chunk < 1 ? 1 : chunk;

  alignas(64) TileBuffers buffers;
  Tile tile;
  int64_t next_tile = window.rows[begin] * classes / kTileCells;
  int64_t present = begin;  // first sorted row that the next tile may touch
  for (int64_t measured = begin; measured < end;) {
    const int64_t until = measured + chunk < end ? measured + chunk : end;
    measure_rows(state, window, measured, until, begin, statistics, valid_draws);
    if (picked.picks) pick_codes(state.classes, window, picked, measured, until, begin, statistics);
    measured = until;
    // tiles whose rows are all measured
    while (present < measured) {
      const int64_t first_tile = window.rows[present] * classes / kTileCells;
      if (next_tile < first_tile) next_tile = first_tile;
      const int64_t tile_end = (next_tile + 1) * kTileCells;
      if (measured < end && window.rows[measured] * classes < tile_end) break;
      tile.first_cell = next_tile * kTileCells;
      describe_tile(state, window, present, end, begin, statistics, valid_draws, tile, buffers);
      if (state.counters)
        update_tile<true>(state, tile, window.draws, buffers);
      else
        update_tile<false>(state, tile, window.draws, buffers);
      for (int i = 0; i < tile.segments; ++i) {
        const Segment& segment = tile.segment[i];
        if (segment.valid_draws > 0)
          state.divergence[segment.row] += sum_of_cells(buffers.divergence + segment.begin, segment.end - segment.begin);
      }
      ++next_tile;
      while (present < measured && (window.rows[present] + 1) * classes <= tile_end) ++present;
    }
  }
  for (int64_t i = begin; i < end; ++i) {
    state.counts[window.rows[i]] += valid_draws[i - begin];
    state.invalid[window.rows[i]] += window.draws - valid_draws[i - begin];
  }
}

}  // namespace BKD_ISA
}  // namespace bkd
