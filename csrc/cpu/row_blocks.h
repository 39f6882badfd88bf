// Blocks of sorted rows that share no tile, so that threads may work on them at once.
#pragma once
#include <atomic>
#include <cstdint>

#include "../histogram.h"
#include "cpu/parallel.h"

namespace bkd {

class RowBlocks {
 public:
  // rows: [size], ascending; about `planned` of them to a block
  RowBlocks(const int64_t* rows, int64_t size, int64_t row_cells, int64_t planned)
      : rows_(rows), size_(size), row_cells_(row_cells), planned_(planned) {}

  // Every kTileCells-th row starts a tile, so a block is at most that much longer than planned.
  int64_t capacity() const { return planned_ + kTileCells; }

  // f(next) on every thread; next(begin, end) gives the bounds of another block, or false.
  template <class F>
  void each_thread(int threads, const F& f) const {
    const int64_t blocks = (size_ + planned_ - 1) / planned_;
    std::atomic<int64_t> taken{0};
    const auto next = [&](int64_t& begin, int64_t& end) {
      for (int64_t block; (block = taken.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
        begin = start(block * planned_);
        end = start((block + 1) * planned_);
        if (begin < end) return true;
      }
      return false;
    };
    parallel_for(blocks < threads ? blocks : threads, threads, [&](int64_t) { f(next); });
  }

 private:
  // Whether a block may start at sorted row i: its tile is not the tile where row i - 1 ends.
  bool may_start(int64_t i) const {
    if (i <= 0 || i >= size_) return true;
    const int64_t last_tile = ((rows_[i - 1] + 1) * row_cells_ - 1) / kTileCells;
    return rows_[i] * row_cells_ / kTileCells != last_tile;
  }

  int64_t start(int64_t i) const {
    while (!may_start(i)) ++i;
    return i < size_ ? i : size_;
  }

  const int64_t* rows_;
  int64_t size_, row_cells_, planned_;
};

}  // namespace bkd
