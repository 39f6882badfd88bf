// The posterior predictive's update of one tile as a warp does it: every lane owns two neighbouring cells, one 32-bit word of
// each slot, so that nothing is atomic and lanes share nothing but the sums of divergences. Plain C++ can run a warp as a loop
// over lanes, and gets the bits of csrc/cpu/predictive.cpp.
#pragma once
#include "predictive.h"
#include "predictive_state.h"

namespace bkd {

constexpr int kLanesPerTile = kTileCells / 2;
constexpr int kSumParts = 4;  // of a sum of divergences: part k takes cells k, k + 4, ...

// What the tiles need to know of one draw of one row.
struct alignas(16) DrawStatistics {
  float maximum, total, rest, inverse_total, log_total;
  int32_t valid;
  float entropy;
  int32_t unused;
};

// The statistics of rows [begin, begin + rows) of a window.
struct StatisticsTable {
  DrawStatistics* data;  // [draws][rows]
  int64_t begin, rows;

  BKD_MEMBER DrawStatistics& at(int draw, int64_t row) const { return data[draw * rows + (row - begin)]; }
};

// The most tiles that a row may touch.
BKD_HD int tiles_per_row(int classes) { return (classes + kTileCells - 2) / kTileCells + 1; }

// A tile with rows of a window in it.
struct TilePlace {
  int64_t tile;
  int64_t first;  // the first of those rows, by its place in window.rows
  int64_t end;    // where the search for the others ends
  int offset;     // of the tile's first cell from that row's; cells before the row are of rows that are not in the window
};

// The nth tile of the window's row `first`, if it has so many and no row of [begin, first) touches it: every tile has one owner.
BKD_HD bool owns_tile(const PredictiveState& state, const PredictiveWindow& window, int64_t begin, int64_t end, int64_t first,
                      int nth, TilePlace& place) {
  const int64_t row = window.rows[first], classes = state.classes;
  if (row >= state.rows) return false;  // left out
  const int64_t tile = row * classes / kTileCells + nth;
  if (tile * kTileCells >= (row + 1) * classes) return false;
  if (first > begin && (window.rows[first - 1] + 1) * classes > tile * kTileCells) return false;
  place = {tile, first, end, (int)(tile * kTileCells - row * classes)};
  return true;
}

// Where the nth row after the place's first is in the window, or -1. Rows ascend, so it is at most that far ahead.
BKD_HD int64_t find_row(const PredictiveWindow& window, const TilePlace& place, int nth) {
  const int64_t row = window.rows[place.first] + nth;
  int64_t i = place.first + nth < place.end ? place.first + nth : place.end - 1;
  while (i > place.first && window.rows[i] > row) --i;
  return window.rows[i] == row ? i : -1;
}

struct CellPlace {
  int64_t row;      // in the window, or -1
  int64_t logit;    // where its logit is among a draw's
  uint32_t count;   // draws of its row before the window
};

BKD_HD CellPlace place_cell(const PredictiveState& state, const PredictiveWindow& window, const TilePlace& place, int cell) {
  const int offset = place.offset + cell;
  if (offset < 0) return {-1, 0, 0};
  const int nth = (int)((uint32_t)offset / (uint32_t)state.classes);
  const int64_t row = find_row(window, place, nth);
  if (row < 0 || window.rows[row] >= state.rows) return {-1, 0, 0};  // padding may seem to be of a row that is left out
  return {row, window.batch[row] * state.classes + (offset - nth * state.classes), (uint32_t)state.counts[window.rows[row]]};
}

// A cell while the draws pass.
struct CellSums {
  float shift, sum, square_sum;
  float reference, inverse_reference, log_reference, divergence;
  int minimum, maximum;
};

BKD_HD void add_divergence(CellSums& cell, const CellDraw& draw) {
  cell.divergence = add(cell.divergence, divergence_term(draw.probability, draw.log_probability, cell.reference,
                                                         cell.inverse_reference, cell.log_reference));
}

BKD_HD void set_reference(CellSums& cell, float reference) {
  cell.reference = reference;
  cell.inverse_reference = div(1.0f, reference);
  cell.log_reference = log_positive(reference);
  cell.divergence = 0.0f;
}

BKD_HD CellDraw draw_of(float logit, const DrawStatistics& row) {
  return draw_of(logit, row.maximum, row.total, row.rest, row.inverse_total, row.log_total);
}

// Takes a valid draw; gives its code, if it is wanted.
template <bool coded> BKD_HD int take_draw(CellSums& cell, float logit, const DrawStatistics& row) {
  const CellDraw draw = draw_of(logit, row);
  int code = 0;
  if (coded) {
    code = code_of(logit_of(draw));
    cell.minimum = code < cell.minimum ? code : cell.minimum;
    cell.maximum = code > cell.maximum ? code : cell.maximum;
  }
  const float deviation = sub(draw.probability, cell.shift);
  cell.sum = add(cell.sum, deviation);
  cell.square_sum = fma(deviation, deviation, cell.square_sum);
  add_divergence(cell, draw);
  return code;
}

// Two neighbouring values, moved as one.
template <class T> struct alignas(2 * sizeof(T)) Two {
  T of[2];
};
template <class T> BKD_HD Two<T>& two_at(T* p) { return *(Two<T>*)p; }

constexpr int kGroup = 4;  // draws whose logits are loaded together and whose codes wait in registers

// A lane's two cells. one_row: both are of one row (the number of classes is even). log2_bins = 0: there is no histogram.
template <bool one_row, int log2_bins>
struct Lane {
  static constexpr int bins = 1 << log2_bins;
  static constexpr bool histogram = log2_bins > 0;

  const PredictiveState& state;
  const PredictiveWindow& window;
  const StatisticsTable& statistics;
  int64_t first_cell;  // of the state
  uint16_t* tile;      // the tile's counters in memory
  uint16_t* copy;      // a copy of them, which takes the codes and replaces them at the end
  int first_column;    // of the tile
  CellPlace place[2];
  CellSums cell[2];
  int count[2], level[2];  // draws taken; level of the counters, once they count

  BKD_MEMBER Lane(const PredictiveState& state, const PredictiveWindow& window, const StatisticsTable& statistics,
                  const TilePlace& at, int lane, uint16_t* copy)
      : state(state), window(window), statistics(statistics), first_cell(at.tile * kTileCells + 2 * lane),
        tile(state.counters + at.tile * (bins * kTileCells)), copy(copy), first_column(2 * lane) {
    place[0] = place_cell(state, window, at, 2 * lane);
    place[1] = one_row ? place[0] : place_cell(state, window, at, 2 * lane + 1);
    if (one_row) place[1].logit = place[0].logit + 1;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      count[k] = (int)place[k].count;
      cell[k].divergence = 0.0f;
    }
  }

  BKD_MEMBER bool present() const { return place[0].row >= 0 || (!one_row && place[1].row >= 0); }

  // Takes the window's draws: codes, moments, divergences; writes the cells' state, and their counters into the
  // copy, which must be one by now. Only where present().
  BKD_MEMBER void take_draws() {
    const Two<float> mean = two_at(state.mean + first_cell), m2 = two_at(state.m2 + first_cell);
    const Two<float> reference = two_at(state.reference + first_cell);
    Two<int16_t> minimum = {}, maximum = {};
    if (histogram) {
      minimum = two_at(state.minimum + first_cell);
      maximum = two_at(state.maximum + first_cell);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      cell[k].shift = mean.of[k];
      cell[k].sum = cell[k].square_sum = 0.0f;
      cell[k].minimum = minimum.of[k];
      cell[k].maximum = maximum.of[k];
      level[k] = histogram && count[k] > bins ? level_of(minimum.of[k], maximum.of[k], log2_bins) : 0;
      set_reference(cell[k], is_new(k) ? 1.0f : reference.of[k]);  // that of a new cell is its mean, known later
    }
    const bool any_new = is_new(0) || is_new(1);
    if (any_new) take_shifts();
    for (int w = 0; w < window.draws; w += kGroup) take_group(w);
#pragma unroll
    for (int k = 0; k < 2; ++k) write(k, m2.of[k]);
    if (any_new) take_divergences();
#pragma unroll
    for (int k = 0; k < 2; ++k) cell[k].divergence = mul(cell[k].divergence, cell[k].reference);
  }

 private:
  // One draw of both cells.
  struct Draw {
    float logit[2];
    DrawStatistics row[2];
  };

  BKD_MEMBER Draw load(int w) const {
    Draw draw;
    const float* logits = window.logits + w * window.draw_stride;
    if (one_row) {
      const Two<float> both = two_at((float*)logits + place[0].logit);
      draw.logit[0] = both.of[0];
      draw.logit[1] = both.of[1];
      draw.row[0] = draw.row[1] = statistics.at(w, place[0].row);
      return draw;
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      draw.logit[k] = 0.0f;
      draw.row[k].valid = 0;
      if (place[k].row < 0) continue;
      draw.logit[k] = logits[place[k].logit];
      draw.row[k] = statistics.at(w, place[k].row);
    }
    return draw;
  }

  BKD_MEMBER bool is_new(int k) const { return place[k].row >= 0 && place[k].count == 0; }

  // The first valid draw's probabilities are what the moments of a new cell are taken about.
  BKD_MEMBER void take_shifts() {
    bool found[2] = {!is_new(0), !is_new(1)};
    for (int w = 0; w < window.draws && !(found[0] && found[1]); ++w) {
      const Draw draw = load(w);
#pragma unroll
      for (int k = 0; k < 2; ++k)
        if (!found[k] && draw.row[k].valid) {
          cell[k].shift = draw_of(draw.logit[k], draw.row[k]).probability;
          found[k] = true;
        }
    }
  }

  // Of new cells, whose reference the first pass has found.
  BKD_MEMBER void take_divergences() {
    for (int w = 0; w < window.draws; ++w) {
      const Draw draw = load(w);
#pragma unroll
      for (int k = 0; k < 2; ++k)
        if (is_new(k) && draw.row[k].valid) add_divergence(cell[k], draw_of(draw.logit[k], draw.row[k]));
    }
  }

  BKD_MEMBER void take_group(int first) {
    Draw draw[kGroup];
    bool every = true;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      draw[i].row[0].valid = draw[i].row[1].valid = 0;
      if (first + i < window.draws) draw[i] = load(first + i);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) every = every && draw[i].row[0].valid && (one_row || draw[i].row[1].valid);
    if (every)
      take_codes<true>(draw);
    else
      take_codes<false>(draw);
  }

  template <bool every_draw_valid>
  BKD_MEMBER void take_codes(const Draw (&draw)[kGroup]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int minimum = cell[k].minimum, maximum = cell[k].maximum;
      int codes[kGroup], valid = 0;
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        if (every_draw_valid || draw[i].row[k].valid) {
          codes[i] = take_draw<histogram>(cell[k], draw[i].logit[k], draw[i].row[k]);
          ++valid;
        }
      if (!histogram) count[k] += valid;
      if (!histogram || (!every_draw_valid && valid == 0)) continue;
      const Column column{copy + first_column + k};
      if (count[k] + valid <= bins) {
        int at = count[k];
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          if (every_draw_valid || draw[i].row[k].valid) column[at++] = (uint16_t)codes[i];
      } else {
        if (count[k] <= bins || minimum != cell[k].minimum || maximum != cell[k].maximum) raise_level(k, minimum, maximum);
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          if (every_draw_valid || draw[i].row[k].valid) {
            uint16_t& counter = column[slot_of(codes[i], level[k], bins)];
            counter = (uint16_t)(counter + 1);
          }
      }
      count[k] += valid;
    }
  }

  // Brings the copy's column from kept codes, or from the level of old_minimum..old_maximum, to the level that the extremes
  // now ask for. The column in memory, which the copy replaces at the end, is the room to do so.
  BKD_MEMBER void raise_level(int k, int old_minimum, int old_maximum) {
    const int raised = level_of(cell[k].minimum, cell[k].maximum, log2_bins);
    if (count[k] > bins && raised == level[k]) return;
    level[k] = raised;
    const Column from{copy + first_column + k}, room{tile + first_column + k};
#pragma unroll 1
    for (int slot = 0; slot < bins; ++slot) room[slot] = 0;
    add_at_level(from, count[k], old_minimum, old_maximum, log2_bins, raised, room);
#pragma unroll 1
    for (int slot = 0; slot < bins; ++slot) from[slot] = room[slot];
  }

  // Chan's merge of the window into the running moments, both taken about `shift`.
  BKD_MEMBER void write(int k, float m2) {
    if (count[k] == (int)place[k].count) {  // no valid draw
      cell[k].divergence = 0.0f;
      return;
    }
    const int64_t at = first_cell + k;
    const float step = mul(cell[k].sum, div(1.0f, (float)count[k])), mean = add(cell[k].shift, step);
    state.mean[at] = mean;
    state.m2[at] = add(m2, fnma(cell[k].sum, step, cell[k].square_sum));
    if (histogram) {
      state.minimum[at] = (int16_t)cell[k].minimum;
      state.maximum[at] = (int16_t)cell[k].maximum;
    }
    if (!is_new(k)) return;
    set_reference(cell[k], max(mean, kSmallestReference));
    state.reference[at] = cell[k].reference;
  }
};

// The code of the nth pick of the window's row i in draw w, and whether the draw counts.
BKD_HD void pick_code(const PredictiveState& state, const PredictiveWindow& window, const PickedCodes& picked,
                      const StatisticsTable& statistics, int w, int64_t i, int nth) {
  const int64_t row = window.rows[i], at = w * window.size + i;
  const bool valid = row < state.rows && statistics.at(w, i).valid;  // a row that is left out does not count
  if (nth == 0) picked.valid[at] = valid;
  if (!valid) return;
  const int32_t c = picked.classes[row * picked.picks + nth];
  const float logit = window.logits[w * window.draw_stride + window.batch[i] * state.classes + c];
  picked.codes[at * picked.picks + nth] = (int16_t)code_of(logit_of(draw_of(logit, statistics.at(w, i))));
}

// Part `part` of the sum of a tile's divergences over the place's nth row; parts 0 and 1, 2 and 3, and then both make the sum.
BKD_HD double sum_part(const float* divergence, const TilePlace& place, int classes, int nth, int part) {
  const int begin = nth * classes - place.offset, end = begin + classes < kTileCells ? begin + classes : kTileCells;
  double sum = 0;
  for (int j = (begin > 0 ? begin : 0) + part; j < end; j += kSumParts) sum += (double)divergence[j];
  return sum;
}

// Into the state of a row: entropies of its valid draws in order, sums of divergences tile by tile, and the counts.
BKD_HD void finish_row(const PredictiveState& state, const PredictiveWindow& window, const StatisticsTable& statistics,
                       const double* sums, int64_t i) {
  const int64_t row = window.rows[i];
  if (row >= state.rows) return;  // left out
  double entropy = state.entropy[row], divergence = state.divergence[row];
  int valid = 0;
  for (int w = 0; w < window.draws; ++w) {
    const DrawStatistics& draw = statistics.at(w, i);
    if (!draw.valid) continue;
    entropy += (double)draw.entropy;
    ++valid;
  }
  state.invalid[row] += window.draws - valid;
  if (valid == 0) return;
  const int64_t first_cell = row * state.classes;
  const int tiles = (int)((first_cell + state.classes - 1) / kTileCells - first_cell / kTileCells) + 1;
  for (int t = 0; t < tiles; ++t) divergence += sums[t];
  state.entropy[row] = entropy;
  state.divergence[row] = divergence;
  state.counts[row] += valid;
}

}  // namespace bkd
