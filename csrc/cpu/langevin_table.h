// A table of tensors cut into chunks: what threads take one by one.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/langevin.h"

namespace bkd {

constexpr int64_t kChunk = 64 * 1024;  // elements: long enough to amortise a start, short enough to balance two threads

struct Chunk {
  int32_t tensor;
  int64_t begin, end;
};

std::vector<Chunk> chunks_of(const std::vector<LangevinTensor>& tensors);

// Each tensor's chains one by one: equal parts, one behind the other, whose elements count from the same first one.
std::vector<LangevinTensor> split_into_chains(const std::vector<LangevinTensor>& tensors, Storage storage, int64_t chains);

// One step of every tensor, on at most `threads` threads.
void langevin_step(const std::vector<LangevinTensor>& tensors, const LangevinStep& step, int threads);

// Per tensor of data (with its count): whether it holds a NaN or an infinity.
std::vector<bool> find_nonfinite(const std::vector<const void*>& data, const std::vector<int64_t>& counts, Storage storage,
                                 int threads);

}  // namespace bkd
