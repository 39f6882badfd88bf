// Adding codes to the tiles of one block of rows (tile_codes.h): neighbouring rows that are alike go together.
#include "cpu/sketch_update.h"

#include "cpu/tile_codes.h"

namespace bkd {
namespace BKD_ISA {

static uint64_t valid_draws_of(const CodeWindow& window, int64_t i) {
  if (!window.valid) return every_of(window.draws);
  uint64_t valid = 0;
  for (int w = 0; w < window.draws; ++w) valid |= (uint64_t)(window.valid[w * window.size + i] != 0) << w;
  return valid;
}

// The part of the window's row i that lies in the tile, as cells of it.
struct RowPart {
  int begin, end;
  int64_t skipped;  // cells of the row before the tile
};

static RowPart part_of(const SketchTiles& sketch, const CodeWindow& window, int64_t i, int64_t first_cell) {
  const int64_t start = window.rows[i] * sketch.row_cells - first_cell, end = start + sketch.row_cells;
  return {start > 0 ? (int)start : 0, end < kTileCells ? (int)end : kTileCells, start < 0 ? -start : 0};
}

// Rows [first, end) of the window that are alike and lie side by side in the tile, as one segment; their codes are copied.
static CodeSegment take_rows(const SketchTiles& sketch, const CodeWindow& window, int64_t first, int64_t end, uint32_t count,
                             uint64_t valid, int64_t first_cell, CodeBuffers& buffers) {
  const RowPart part = part_of(sketch, window, first, first_cell);
  const int last = part_of(sketch, window, end - 1, first_cell).end;
  const int16_t* codes = window.codes + first * sketch.row_cells + part.skipped;
  for (int w = 0; w < window.draws; ++w)
    memcpy(buffers.codes + w * kTileCells + part.begin, codes + w * window.size * sketch.row_cells,
           sizeof(int16_t) * (size_t)(last - part.begin));
  return {part.begin, last, count, valid, __builtin_popcountll(valid)};
}

void sketch_block(const SketchTiles& sketch, int32_t* counts, const CodeWindow& window, int64_t begin, int64_t end) {
  CodeBuffers buffers;
  CodeSegment segments[kTileCells];
  const auto tile_after = [&](int64_t cell) { return (cell + kTileCells - 1) / kTileCells; };
  int64_t tile = 0;
  for (int64_t first = begin; first < end;) {  // the first row that the next tile may touch
    const int64_t row_tile = window.rows[first] * sketch.row_cells / kTileCells;
    tile = row_tile > tile ? row_tile : tile;
    const int64_t first_cell = tile * kTileCells, tile_end = first_cell + kTileCells;
    int count = 0;
    int64_t i = first;
    while (i < end && window.rows[i] * sketch.row_cells < tile_end) {
      const uint32_t draws = (uint32_t)counts[window.rows[i]];
      const uint64_t valid = valid_draws_of(window, i);
      int64_t next = i + 1;
      while (next < end && window.rows[next] == window.rows[next - 1] + 1 && window.rows[next] * sketch.row_cells < tile_end &&
             (uint32_t)counts[window.rows[next]] == draws && valid_draws_of(window, next) == valid)
        ++next;
      segments[count++] = take_rows(sketch, window, i, next, draws, valid, first_cell, buffers);
      i = next;
    }
    const TileCounters counters{sketch.counters + (first_cell << sketch.log2_bins), sketch.minimum + first_cell,
                                sketch.maximum + first_cell, sketch.log2_bins};
    if (count) add_codes(counters, segments, count, window.draws, buffers);
    ++tile;
    while (first < end && tile_after((window.rows[first] + 1) * sketch.row_cells) <= tile) ++first;
  }
  for (int64_t i = begin; i < end; ++i) counts[window.rows[i]] += __builtin_popcountll(valid_draws_of(window, i));
}

}  // namespace BKD_ISA
}  // namespace bkd
