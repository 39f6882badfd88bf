// Adding a window of codes to tiles of the dyadic logit histogram on the CPU, whatever the codes are of.
#pragma once
#include "cpu/dispatch.h"
#include "cpu/sketch.h"

namespace bkd {

// Codes of `draws` <= kMaxDraws draws for sorted rows of the sketch.
struct CodeWindow {
  const int16_t* codes;  // [draws][size][row_cells]
  const uint8_t* valid;  // [draws][size] whether the draw of the row counts, or nullptr: all do
  int32_t draws;
  const int64_t* rows;  // [size] rows of the sketch, ascending
  int64_t size;
};

// Rows [begin, end) of the window, which share no tile with others. counts: the sketch's own, brought up to date.
BKD_DECLARE(void, sketch_block, (const SketchTiles& sketch, int32_t* counts, const CodeWindow& window, int64_t begin, int64_t end))

// The whole window, on `threads` threads; the result does not depend on their number.
void sketch_update(const SketchTiles& sketch, int32_t* counts, const CodeWindow& window, int threads);

}  // namespace bkd
