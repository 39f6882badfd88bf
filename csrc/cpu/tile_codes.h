// Codes of a window of draws on their way into the counters of one tile: kept as they are while a row has few draws, else
// counted by comparing bytes, 64 cells at a time. For files that are compiled per instruction set.
#pragma once
#include "../predictive_state.h"
#include "simd.h"

namespace bkd {
namespace BKD_ISA {

constexpr uint8_t kNoSlot = 0xFF;

struct TileCounters {
  uint16_t* counters;  // [bins][kTileCells]
  int16_t* minimum;    // [kTileCells]
  int16_t* maximum;
  int log2_bins;
};

// Neighbouring cells of a tile whose rows have one count, and the draws of the window that count.
struct CodeSegment {
  int begin, end;   // cells of the tile
  uint32_t count;   // draws before this window
  uint64_t valid;   // bit w: draw w counts
  int valid_draws;  // how many do
};

struct CodeBuffers {
  alignas(64) int16_t codes[kMaxDraws * kTileCells];  // of the window, for add_codes to read
  alignas(64) uint8_t slots[(kMaxDraws + kMaxBins) * kTileCells];
};

BKD_INLINE uint64_t every_of(int draws) { return ~(uint64_t)0 >> (64 - draws); }

// counters[slot][cell] += number of d with slots[d][cell] == slot; 64 cells, at most 255 slots each (kNoSlot is none).
static void compare_and_add(uint16_t* counters, const uint8_t* slots, int count, int bins) {
#if defined(BKD_ISA_avx512)
  constexpr int kAtOnce = 8;
  const __m512i minus_one = _mm512_set1_epi8(-1);
  for (int first = 0; first < bins; first += kAtOnce) {
    __m512i seen[kAtOnce];
    for (int k = 0; k < kAtOnce; ++k) seen[k] = _mm512_setzero_si512();
    for (int d = 0; d < count; ++d) {
      const __m512i slot = _mm512_load_si512(slots + d * kTileCells);
      for (int k = 0; k < kAtOnce; ++k)
        seen[k] = _mm512_mask_sub_epi8(seen[k], _mm512_cmpeq_epi8_mask(slot, _mm512_set1_epi8((char)(first + k))), seen[k],
                                       minus_one);
    }
    for (int k = 0; k < kAtOnce; ++k) {
      uint16_t* row = counters + (first + k) * kTileCells;
      const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(seen[k]));
      const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(seen[k], 1));
      _mm512_storeu_si512(row, _mm512_add_epi16(_mm512_loadu_si512(row), low));
      _mm512_storeu_si512(row + 32, _mm512_add_epi16(_mm512_loadu_si512(row + 32), high));
    }
  }
#elif defined(BKD_ISA_avx2)
  constexpr int kAtOnce = 4;
  for (int half = 0; half < kTileCells; half += 32)
    for (int first = 0; first < bins; first += kAtOnce) {
      __m256i seen[kAtOnce];
      for (int k = 0; k < kAtOnce; ++k) seen[k] = _mm256_setzero_si256();
      for (int d = 0; d < count; ++d) {
        const __m256i slot = _mm256_load_si256((const __m256i*)(slots + d * kTileCells + half));
        for (int k = 0; k < kAtOnce; ++k)
          seen[k] = _mm256_sub_epi8(seen[k], _mm256_cmpeq_epi8(slot, _mm256_set1_epi8((char)(first + k))));
      }
      for (int k = 0; k < kAtOnce; ++k) {
        __m256i* row = (__m256i*)(counters + (first + k) * kTileCells + half);
        const __m256i low = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(seen[k]));
        const __m256i high = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(seen[k], 1));
        _mm256_storeu_si256(row, _mm256_add_epi16(_mm256_loadu_si256(row), low));
        _mm256_storeu_si256(row + 1, _mm256_add_epi16(_mm256_loadu_si256(row + 1), high));
      }
    }
#else
  (void)bins;
  for (int d = 0; d < count; ++d)
    for (int j = 0; j < kTileCells; ++j) {
      const uint8_t slot = slots[d * kTileCells + j];
      if (slot != kNoSlot) ++counters[slot * kTileCells + j];
    }
#endif
}

// Brings one cell's counters from the level of old_min..old_max to a coarser one.
static void fold_cell(uint16_t* counters, int cell, int old_min, int old_max, int old_level, int level, int bins) {
  uint16_t before[kMaxBins], after[kMaxBins];
  for (int s = 0; s < bins; ++s) {
    before[s] = counters[s * kTileCells + cell];
    after[s] = 0;
  }
  rescale(before, old_min, old_max, old_level, level, bins, after);
  for (int s = 0; s < bins; ++s) counters[s * kTileCells + cell] = after[s];
}

// Adds the codes of cells [begin, end), a segment's or all that are alike, to the tile: keeps them as they are while the rows
// have at most `bins` draws, else writes their slots for compare_and_add. Returns the number of earlier codes that became
// slots (behind the window's own).
BKD_INLINE int place_codes(const TileCounters& tile, const CodeSegment& segment, int begin, int end, int draws,
                           CodeBuffers& buffers) {
  const int log2_bins = tile.log2_bins, bins = 1 << log2_bins;
  const bool all = segment.valid_draws == draws;
  const auto is_valid = [&](int w) { return all || (segment.valid >> w & 1); };
  int16_t least[kTileCells], most[kTileCells];
  for (int j = begin; j < end; ++j) {
    least[j] = tile.minimum[j];
    most[j] = tile.maximum[j];
  }
  for (int w = 0; w < draws; ++w) {
    if (!is_valid(w)) continue;
    const int16_t* codes = buffers.codes + w * kTileCells;
    for (int j = begin; j < end; ++j) {
      least[j] = codes[j] < least[j] ? codes[j] : least[j];
      most[j] = codes[j] > most[j] ? codes[j] : most[j];
    }
  }
  int earlier = 0;
  if (segment.count + (uint32_t)segment.valid_draws <= (uint32_t)bins) {
    uint16_t* to = tile.counters + segment.count * kTileCells;
    for (int w = 0; w < draws; ++w) {
      if (!is_valid(w)) continue;
      for (int j = begin; j < end; ++j) to[j] = (uint16_t)buffers.codes[w * kTileCells + j];
      to += kTileCells;
    }
  } else {
    int16_t level[kTileCells];
    uint16_t scale[kTileCells];
    for (int j = begin; j < end; ++j) {
      level[j] = (int16_t)level_of(least[j], most[j], log2_bins);
      scale[j] = (uint16_t)(1 << (16 - log2_bins - level[j]));
    }
    // (code >> level) mod bins, as a product: 16-bit vectors have no shift by a lane's own distance on AVX2
    const auto write_slots = [&](uint8_t* slots, const int16_t* codes) {
      for (int j = begin; j < end; ++j) slots[j] = (uint8_t)((uint16_t)(codes[j] * scale[j]) >> (16 - log2_bins));
    };
    if (segment.count <= (uint32_t)bins) {
      earlier = (int)segment.count;
      for (int i = 0; i < earlier; ++i) {
        uint16_t* codes = tile.counters + i * kTileCells;
        write_slots(buffers.slots + (draws + i) * kTileCells, (const int16_t*)codes);
        for (int j = begin; j < end; ++j) codes[j] = 0;
      }
    } else {
      int16_t old_level[kTileCells];
      int risen = 0;
      for (int j = begin; j < end; ++j) {
        old_level[j] = (int16_t)level_of(tile.minimum[j], tile.maximum[j], log2_bins);
        risen |= level[j] ^ old_level[j];
      }
      for (int j = begin; risen && j < end; ++j)
        if (level[j] != old_level[j])
          fold_cell(tile.counters, j, tile.minimum[j], tile.maximum[j], old_level[j], level[j], bins);
    }
    for (int w = 0; w < draws; ++w)
      if (is_valid(w)) write_slots(buffers.slots + w * kTileCells, buffers.codes + w * kTileCells);
  }
  for (int j = begin; j < end; ++j) {
    tile.minimum[j] = least[j];
    tile.maximum[j] = most[j];
  }
  return earlier;
}

// Adds buffers.codes, `draws` of them for each cell, to the tile's counters. Segments: of CodeSegment or what derives from it.
template <class Segment>
static void add_codes(const TileCounters& tile, const Segment* segments, int count, int draws, CodeBuffers& buffers) {
  const int bins = 1 << tile.log2_bins;
  int alike = 0;  // cells
  for (int i = 0; i < count; ++i)
    if (segments[i].valid_draws == draws && segments[i].count == segments[0].count)
      alike += segments[i].end - segments[i].begin;
  if (alike == kTileCells) {  // constant bounds, so that the loops over cells become a few vectors
    const int earlier = place_codes(tile, segments[0], 0, kTileCells, draws, buffers);
    if (segments[0].count + (uint32_t)draws > (uint32_t)bins)
      compare_and_add(tile.counters, buffers.slots, draws + earlier, bins);
    return;
  }
  memset(buffers.slots, kNoSlot, (size_t)(draws + bins) * kTileCells);
  int earlier = 0;
  bool counting = false;
  for (int i = 0; i < count; ++i) {
    const CodeSegment& segment = segments[i];
    if (segment.valid_draws == 0) continue;
    const int more = place_codes(tile, segment, segment.begin, segment.end, draws, buffers);
    earlier = more > earlier ? more : earlier;
    counting = counting || segment.count + (uint32_t)segment.valid_draws > (uint32_t)bins;
  }
  if (counting) compare_and_add(tile.counters, buffers.slots, draws + earlier, bins);
}

}  // namespace BKD_ISA
}  // namespace bkd
