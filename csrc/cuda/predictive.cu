// Operation C on GPUs: W draws of logits for a batch of rows go into the posterior predictive's state, to the CPU's bits.
//
//   measure_rows  softmax statistics of every draw and row. Rows of up to 32 classes: one thread each; longer ones: sixteen
//                 lanes each, the sixteen running sums of csrc/predictive.h.
//   update_tiles  one warp per tile of 64 cells (csrc/tile.h): codes, moments, divergences, and the counters in shared memory.
//   pick_codes    one thread per draw, row and picked class.
//   finish_rows   one thread per row: entropies, divergences and counts.
//
// Bytes per cell and draw: 4 (logits, read twice more from the cache that measure_rows left them in) + 288 / W (state of 144
// bytes read and written; with 64 bins).
#include "tile.h"

namespace bkd {

constexpr int kWarp = 32, kThreads = 256;
constexpr unsigned kAll = 0xFFFFFFFFu;

// Grid: draws * rows threads (short rows) or sixteen times as many. Rows [begin, begin + rows) of the window.
// About 31 instructions per logit: 4 for the maximum, 27 for the exponential and the sums.
template <bool short_rows>
__global__ void __launch_bounds__(kThreads)
    measure_rows(const float* __restrict__ logits, int64_t draw_stride, int32_t draws, const int64_t* __restrict__ batch,
                 int64_t begin, int64_t rows, int32_t classes, DrawStatistics* __restrict__ statistics) {
  constexpr int lanes = short_rows ? 1 : kSumLanes;
  const int64_t thread = (int64_t)blockIdx.x * kThreads + threadIdx.x, all = draws * rows;
  const bool spare = thread / lanes >= all;  // works along on the last row: its neighbours' shuffles need it
  const int64_t at = spare ? all - 1 : thread / lanes;
  const int64_t draw = at / rows;
  const float* row = logits + draw * draw_stride + batch[begin + at - draw * rows] * classes;
  const int lane = threadIdx.x % lanes;

  RowSums sums = {as_float(0xFF800000u), 0.0f, 0.0f, 0.0f};  // -inf
#pragma unroll 4
  for (int c = lane; c < classes; c += lanes) sums.maximum = fmaxf(sums.maximum, row[c]);
#pragma unroll
  for (int half = lanes / 2; half > 0; half /= 2) sums.maximum = fmaxf(sums.maximum, __shfl_xor_sync(kAll, sums.maximum, half));
#pragma unroll 4
  for (int c = lane; c < classes; c += lanes) add_class(row[c], sums.maximum, sums.rest, sums.weighted, sums.ties);
#pragma unroll
  for (int half = lanes / 2; half > 0; half /= 2) {
    sums.rest += __shfl_xor_sync(kAll, sums.rest, half);
    sums.weighted += __shfl_xor_sync(kAll, sums.weighted, half);
    sums.ties += __shfl_xor_sync(kAll, sums.ties, half);
  }
  if (spare || lane != 0) return;
  const RowStatistics of = statistics_of(sums);
  statistics[at] = {of.maximum, of.total, of.rest, of.inverse_total, of.log_total, of.valid, of.entropy, 0};
}

// 16 bytes from global to shared memory, without waiting.
static __device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global)
               : "memory");
}

// Grid: tiles_per_row(classes) blocks of one warp for each of the window's rows [begin, end); those that own no tile end at
// once. sums: [end - begin][tiles_per_row], of divergences. At least 16 of them at once on a multiprocessor, which leaves
// each thread 128 registers. Per cell and draw 71 instructions for code, moments and divergence, 8 for the counter and about 10
// for what a group of draws needs: 89. log2_bins = 0: no histogram.
template <bool one_row, int log2_bins>
__global__ void __launch_bounds__(kWarp, 16)
    update_tiles(const float* logits, int64_t draw_stride, int32_t draws, const int64_t* rows, const int64_t* batch,
                 int64_t begin, int64_t end, DrawStatistics* draw_statistics, double* sums, uint16_t* counters,
                 int16_t* minimum, int16_t* maximum, float* mean, float* m2, float* reference, int32_t* counts,
                 int64_t num_rows, int32_t classes) {
  constexpr bool histogram = log2_bins > 0;
  constexpr int bins = 1 << log2_bins, pieces = histogram ? bins * kTileCells * sizeof(uint16_t) / 16 / kWarp : 0;
  __shared__ alignas(16) uint16_t shared[bins * kTileCells];
  __shared__ float divergence[kTileCells];

  const PredictiveState state{counters, minimum, maximum, mean,     m2,      reference, counts,
                              nullptr,  nullptr, nullptr, num_rows, classes, log2_bins};
  const PredictiveWindow window{logits, draw_stride, draws, rows, batch, end};
  const StatisticsTable statistics{draw_statistics, begin, end - begin};
  const int per_row = tiles_per_row(classes), lane = threadIdx.x;
  TilePlace place;
  if (!owns_tile(state, window, begin, end, begin + blockIdx.x / per_row, blockIdx.x % per_row, place)) return;

  uint4* const tile = (uint4*)(counters + place.tile * (bins * kTileCells));
#pragma unroll
  for (int i = 0; i < pieces; ++i) copy_async((uint4*)shared + i * kWarp + lane, tile + i * kWarp + lane);
  Lane<one_row, log2_bins> cells(state, window, statistics, place, lane, shared);
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
  if (cells.present()) cells.take_draws();
  divergence[2 * lane] = cells.cell[0].divergence;
  divergence[2 * lane + 1] = cells.cell[1].divergence;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < pieces; ++i) tile[i * kWarp + lane] = ((const uint4*)shared)[i * kWarp + lane];

  const int last = (place.offset + kTileCells - 1) / classes;  // row of the tile, counted from the place's first
  for (int some = 0; some <= last; some += kWarp / kSumParts) {
    const int nth = some + lane / kSumParts;
    const int64_t row = nth <= last ? find_row(window, place, nth) : -1;
    double sum = row >= 0 ? sum_part(divergence, place, classes, nth, lane % kSumParts) : 0;
    sum += __shfl_xor_sync(kAll, sum, 1);
    sum += __shfl_xor_sync(kAll, sum, 2);
    if (row >= 0 && lane % kSumParts == 0)
      sums[(row - begin) * per_row + (place.tile - rows[row] * classes / kTileCells)] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    pick_codes(const float* logits, int64_t draw_stride, int32_t draws, const int64_t* rows, const int64_t* batch, int64_t begin,
               int64_t end, int64_t size, DrawStatistics* draw_statistics, const int32_t* picked, int32_t picks, int16_t* codes,
               uint8_t* valid, int64_t num_rows, int32_t classes) {
  const int64_t thread = (int64_t)blockIdx.x * kThreads + threadIdx.x, per_draw = (end - begin) * picks;
  if (thread >= draws * per_draw) return;
  const int w = (int)(thread / per_draw);
  const int64_t pair = thread - w * per_draw, i = begin + pair / picks;
  const PredictiveState state{nullptr, nullptr, nullptr, nullptr,  nullptr, nullptr, nullptr,
                              nullptr, nullptr, nullptr, num_rows, classes, 0};
  const PredictiveWindow window{logits, draw_stride, draws, rows, batch, size};
  pick_code(state, window, {picked, picks, codes, valid}, {draw_statistics, begin, end - begin}, w, i,
            (int)(pair - (i - begin) * picks));
}

__global__ void __launch_bounds__(kThreads)
    finish_rows(int32_t draws, const int64_t* rows, int64_t begin, int64_t end, DrawStatistics* draw_statistics,
                const double* sums, int32_t* counts, int32_t* invalid, double* entropy, double* divergence, int64_t num_rows,
                int32_t classes) {
  const int64_t i = begin + (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i >= end) return;
  const PredictiveState state{nullptr, nullptr, nullptr,    nullptr,  nullptr, nullptr, counts,
                              invalid, entropy, divergence, num_rows, classes, 0};
  const PredictiveWindow window{nullptr, 0, draws, rows, nullptr, end};
  const StatisticsTable statistics{draw_statistics, begin, end - begin};
  finish_row(state, window, statistics, sums + (i - begin) * tiles_per_row(classes), i);
}

}  // namespace bkd
