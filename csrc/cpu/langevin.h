// Operation A on the CPU: one step of many tensors by one rule. A table of tensors is cut into chunks, which threads take.
#pragma once
#include "../half.h"
#include "../noise.h"
#include "../rules.h"
#include "cpu/dispatch.h"

namespace bkd {

// How the step comes back to a 16-bit parameter (csrc/langevin.h). Wider ones are computed in their own type: nearest.
enum class Rounding { nearest = 0, stochastic = 1, master = 2 };

// One parameter of one chain, flat in its storage order. mean, m2, first and second (or null) are of the arithmetic's type:
// float, for float64 double.
struct LangevinTensor {
  void* theta;
  const void* gradient;
  const void* center;  // or null: the prior's mean is 0
  void* mean;
  void* m2;
  float* master;  // Rounding::master: holds the chain
  void* first;    // the rule's state
  void* second;
  int64_t count;
  uint64_t first_element;  // of the whole parameter: not 0 for a shard
  uint32_t parameter;
  uint32_t chain;      // of the step's chains, from 0
  uint8_t* nonfinite;  // null: no check; else set to 1 when an element's gradient is not finite (that element stays)
};

// What a rule's numbers are is in csrc/langevin.h. To maximise, negate lr and decay: the same bits as negating the gradient.
struct StepNumbers {
  double lr, decay, sigma, own[kOwnNumbers];
};

struct LangevinStep {
  Rule rule;
  Storage storage;
  Rounding rounding;
  uint64_t seed, step;
  uint32_t chain;              // the first
  const StepNumbers* numbers;  // for each chain, or one for all
  bool numbers_per_chain;
  double inverse_count;      // of the running moments
  const float* noise_table;  // Rounding::stochastic: sigma by the exponent field, for each chain where there are numbers for each

  const StepNumbers& numbers_of(const LangevinTensor& tensor) const { return numbers[numbers_per_chain ? tensor.chain : 0]; }
};

// Elements [begin, end) of one tensor.
BKD_DECLARE(void, langevin_chunk, (const LangevinTensor& tensor, const LangevinStep& step, int64_t begin, int64_t end))

// Whether data[0 .. count) holds a NaN or an infinity.
BKD_DECLARE(bool, has_nonfinite, (const void* data, int64_t count, Storage storage))

}  // namespace bkd
