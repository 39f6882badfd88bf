// Operation B on the CPU: the KD energy of a batch of rows. Rows are cut into blocks, blocks into tasks, which threads take.
#pragma once
#include "../half.h"
#include "../kd.h"
#include "cpu/dispatch.h"

namespace bkd {

// Student logits (chains, rows, classes), contiguous; everything else is the same for every chain.
struct KdCall {
  KdSettings settings;
  int64_t chains, rows;
  int64_t ignore_index;

  const void* logits;
  Storage logits_storage;
  const void* teacher;  // (rows, classes), or (teachers, rows, classes) for the mixture; null without a prior
  bool teacher_by_label;  // reverse KL: it is (classes, classes), each row's that of its label; none of a row without one
  Storage teacher_storage;
  const void* indices;  // null, or of a top-k teacher the classes (rows, top), int32 or, where wide_indices, int64: then
  bool wide_indices;    // `teacher` holds their logits (rows, top)
  const float* rest;    // (rows), the logit of each other class
  int64_t top;
  const int64_t* labels;  // (rows), or null
  const void* soft;       // (rows, classes), or null
  Storage soft_storage;
  const double* weights;  // (teachers), or (rows, teachers) where weights_per_row; null: the entropy weights
  bool weights_per_row;

  void* gradient;  // like logits
  void* energy;    // (chains, rows), float, or double for double logits; null: only the sum is wanted
};

struct KdTaskResult {
  double energy;    // sum over the task's rows
  int64_t bad_row;  // the first row, counted through the chains, whose numbers are unusable; -1 for none
  Fault fault;      // what is wrong there
};

constexpr int kBlockRows = 16;       // rows whose energies are finished together: the lanes of the widest register
constexpr int kAcrossClasses = 128;  // up to here a block's rows lie across the lanes, above each row lies along them

// How a call is cut. It depends on shapes alone, so results depend neither on the threads nor on the instruction set's width.
struct KdTiling {
  int64_t block_rows, blocks_per_chain, blocks, blocks_per_task, tasks;
};
KdTiling kd_tiling(const KdCall& call);

// One thread's scratch, in elements: what the vectorised kernels hold (six blocks or rows of floats: the exponentials, and
// inputs and gradient where they cannot be used in place), and what a row of the general kernel holds (doubles at most).
constexpr int64_t kScratchAlignment = 64;
BKD_HD int64_t kd_fast_stride(int64_t classes) {
  const int64_t slack = 2 * kBlockRows;  // whole vectors may be read at the end of a row
  return ((classes <= kAcrossClasses ? kBlockRows * classes : classes) + slack) / kBlockRows * kBlockRows + kBlockRows;
}
BKD_HD int64_t kd_fast_scratch(int64_t classes) { return 6 * kd_fast_stride(classes); }
BKD_HD int64_t kd_general_scratch(const KdSettings& s) {
  return kd_scratch(s) + (3 + s.teachers) * s.classes + 3 * s.teachers;
}

// The whole call on `threads` threads; the results of all tasks in one.
KdTaskResult kd_energy(const KdCall& call, int threads);

BKD_DECLARE(KdTaskResult, kd_task, (const KdCall& call, const KdTiling& tiling, int64_t task, char* scratch))

}  // namespace bkd
