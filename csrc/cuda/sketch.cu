// Reading, sorting and merging the tiles of the dyadic logit histogram on GPUs: one thread per cell, its column of slots read in
// step with its neighbours'; columns that change lie in shared memory meanwhile. Rare beside the updates.
#include "sketch.h"

namespace bkd {

constexpr int kThreads = 256;

// The cell of this thread, its row's count and its place; every thread of a block of kTileCells has a column of one tile.
struct Here {
  int64_t cell;
  int count;
  Column column;
};

template <int log2_bins>
static __device__ __forceinline__ bool find_cell(uint16_t* counters, const int32_t* counts, int64_t rows, int64_t row_cells,
                                                 Here& here) {
  here.cell = (int64_t)blockIdx.x * kTileCells + threadIdx.x;
  if (here.cell >= rows * row_cells) return false;
  here.count = counts[here.cell / row_cells];
  here.column = Column{counters + (int64_t)blockIdx.x * (kTileCells << log2_bins) + threadIdx.x};
  return true;
}

// Grid of the three that follow: a block of kTileCells threads per tile.

template <int log2_bins>
__global__ void __launch_bounds__(kTileCells)
    sort_cells(uint16_t* counters, const int32_t* counts, int64_t rows, int64_t row_cells) {
  __shared__ uint16_t shared[kTileCells << log2_bins];
  Here here;
  if (!find_cell<log2_bins>(counters, counts, rows, row_cells, here) || here.count > 1 << log2_bins) return;
  const Column codes{shared + threadIdx.x};  // no other thread's
  for (int i = 0; i < here.count; ++i) codes[i] = here.column[i];
  sort_codes(codes, here.count);
  for (int i = 0; i < here.count; ++i) here.column[i] = codes[i];
}

template <int log2_bins>
__global__ void __launch_bounds__(kTileCells)
    quantile_cells(uint16_t* counters, const int16_t* minimum, const int16_t* maximum, const int32_t* counts, int64_t rows,
                   int64_t row_cells, double q, int32_t* lower, int32_t* upper, float* point) {
  Here here;
  if (!find_cell<log2_bins>(counters, counts, rows, row_cells, here)) return;
  const CodeQuantile found = quantile_of(here.column, here.count, minimum[here.cell], maximum[here.cell], log2_bins, q);
  lower[here.cell] = found.lower;
  upper[here.cell] = found.upper;
  point[here.cell] = found.point;
}

template <int log2_bins>
__global__ void __launch_bounds__(kTileCells)
    merge_tiles(uint16_t* counters, int16_t* minimum, int16_t* maximum, const int32_t* counts, uint16_t* other_counters,
                const int16_t* other_minimum, const int16_t* other_maximum, const int32_t* other_counts, int64_t rows,
                int64_t row_cells) {
  __shared__ uint16_t shared[kTileCells << log2_bins];
  Here here, other;
  if (!find_cell<log2_bins>(counters, counts, rows, row_cells, here)) return;
  find_cell<log2_bins>(other_counters, other_counts, rows, row_cells, other);
  if (other.count == 0) return;
  const int min = minimum[here.cell], max = maximum[here.cell];
  const int other_min = other_minimum[here.cell], other_max = other_maximum[here.cell];
  const int least = min < other_min ? min : other_min, most = max > other_max ? max : other_max;
  const Column merged{shared + threadIdx.x};
  for (int slot = 0; slot < 1 << log2_bins; ++slot) merged[slot] = 0;
  merge_cells(here.column, here.count, min, max, other.column, other.count, other_min, other_max, least, most, log2_bins, merged);
  for (int slot = 0; slot < 1 << log2_bins; ++slot) here.column[slot] = merged[slot];
  minimum[here.cell] = (int16_t)least;
  maximum[here.cell] = (int16_t)most;
}

// Adds a window of codes, [draws][size][row_cells], to rows of the sketch, each thread to one cell. Its column is worked on in
// shared memory, the one in the tile being the room to do so; other columns of the tile belong to other threads, of other blocks
// too. Counts stay as they are, for other threads read them.
// Grid: blocks of kTileCells threads for the size * row_cells cells.
template <int log2_bins>
__global__ void __launch_bounds__(kTileCells)
    update_cells(uint16_t* counters, int16_t* minimum, int16_t* maximum, const int32_t* counts, int64_t num_rows,
                 int64_t row_cells, const int16_t* codes, const uint8_t* valid, int32_t draws, const int64_t* rows,
                 int64_t size) {
  __shared__ uint16_t shared[kTileCells << log2_bins];
  const int64_t at = (int64_t)blockIdx.x * kTileCells + threadIdx.x, i = at / row_cells;
  if (i >= size || rows[i] >= num_rows) return;
  const int64_t cell = rows[i] * row_cells + (at - i * row_cells);
  const Column column{counters + cell / kTileCells * (kTileCells << log2_bins) + cell % kTileCells};
  const Column copy{shared + threadIdx.x};
  for (int slot = 0; slot < 1 << log2_bins; ++slot) copy[slot] = column[slot];
  int min = minimum[cell], max = maximum[cell];
  const int taken = add_codes_to(
      copy, counts[rows[i]], min, max, log2_bins, draws, [&](int w) { return (int)codes[w * size * row_cells + at]; },
      [&](int w) { return !valid || valid[w * size + i]; }, column);
  if (taken == 0) return;
  for (int slot = 0; slot < 1 << log2_bins; ++slot) column[slot] = copy[slot];
  minimum[cell] = (int16_t)min;
  maximum[cell] = (int16_t)max;
}

// Brings the counts of the window's rows up to date. Grid: a thread per row.
__global__ void __launch_bounds__(kThreads)
    count_draws(int32_t* counts, int64_t num_rows, const uint8_t* valid, int32_t draws, const int64_t* rows, int64_t size) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i >= size || rows[i] >= num_rows) return;
  int taken = 0;
  for (int w = 0; w < draws; ++w) taken += !valid || valid[w * size + i];
  counts[rows[i]] += taken;
}

// The cells of rows [begin, end) as plain histograms. Grid: blocks of kTileCells threads for these cells.
template <int log2_bins>
__global__ void __launch_bounds__(kTileCells)
    histogram_cells(uint16_t* counters, const int16_t* minimum, const int16_t* maximum, const int32_t* counts,
                    int64_t row_cells, int64_t begin, int64_t end, const int16_t* least, const int16_t* most, int32_t* out) {
  __shared__ uint16_t shared[kTileCells << log2_bins];
  const int64_t i = (int64_t)blockIdx.x * kTileCells + threadIdx.x, cell = begin * row_cells + i;
  if (cell >= end * row_cells) return;
  const Column column{counters + cell / kTileCells * (kTileCells << log2_bins) + cell % kTileCells};
  const Column room{shared + threadIdx.x};
  for (int slot = 0; slot < 1 << log2_bins; ++slot) room[slot] = 0;
  histogram_of(column, counts[cell / row_cells], minimum[cell], maximum[cell], log2_bins, least[i], most[i], room,
               out + (i << log2_bins));
}

// The sum of every thread's number, the same tree for every call; kThreads threads.
static __device__ __forceinline__ double sum_of_block(double mine, double* shared) {
  __syncthreads();
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  return shared[0];
}

// Grid: a block per row. The largest code whose own and larger codes weigh `level` of all, by bisection: 17 passes over the row,
// each a sum in one fixed order.
template <int log2_bins>
__global__ void __launch_bounds__(kThreads)
    deviance_quantile(uint16_t* counters, const int16_t* minimum, const int16_t* maximum, const int32_t* counts,
                      int64_t row_cells, const double* level, float* out) {
  __shared__ double shared[kThreads];
  const int64_t row = blockIdx.x;
  const int count = counts[row];
  if (count == 0) {
    if (threadIdx.x == 0) out[row] = as_float(0x7FC00000u);  // NaN
    return;
  }
  const auto weight_from = [&](int lowest) {
    double weight = 0;
    for (int64_t cell = row * row_cells + threadIdx.x; cell < (row + 1) * row_cells; cell += kThreads) {
      const Column column{counters + cell / kTileCells * (kTileCells << log2_bins) + cell % kTileCells};
      each_code(column, count, minimum[cell], maximum[cell], log2_bins, [&](int code, double draws) {
        if (code >= lowest) weight += draws * (double)__fdividef(1.0f, 1.0f + expf(-(float)code / kCodesPerLogit));
      });
    }
    return sum_of_block(weight, shared);
  };
  const double asked = level[row] * weight_from(kCodeMin);
  int reached = kCodeMin, missed = kCodeMax + 1;
  while (missed - reached > 1) {
    const int middle = (reached + missed) >> 1;  // arithmetic: rounds down
    if (weight_from(middle) >= asked)
      reached = middle;
    else
      missed = middle;
  }
  if (threadIdx.x == 0) out[row] = deviance_of(reached);
}

}  // namespace bkd
