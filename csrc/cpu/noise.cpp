// normals(): the noise of any run of elements, into memory.
#include "cpu/normals.h"

#include "cpu/normals_loop.h"

namespace bkd {
namespace BKD_ISA {

void normals(float* out, int64_t count, const Stream& stream, uint64_t first_element) {
  constexpr int64_t kBuffer = 1024;
  alignas(64) float buffer[kBuffer];
  while (count > 0) {
    const uint64_t block = first_element >> 2;
    const int64_t skip = (int64_t)(first_element & 3);
    // a run ends with the buffer, or before the low word of the block number wraps
    const uint64_t until_wrap = 4 * ((UINT64_C(1) << 32) - (block & 0xFFFFFFFFu));
    const int64_t room = until_wrap < (uint64_t)kBuffer ? (int64_t)until_wrap : kBuffer;
    const int64_t take = count < room - skip ? count : room - skip;
    const int64_t made = (skip + take + kNoiseRun - 1) / kNoiseRun * kNoiseRun;
    each_normal(made, stream, block, [&](int64_t i, Floats z) { store(buffer + i, z); });
    memcpy(out, buffer + skip, (size_t)take * sizeof(float));
    out += take;
    count -= take;
    first_element += (uint64_t)take;
  }
}

}  // namespace BKD_ISA
}  // namespace bkd
