// normals() and words(): the noise of any run of elements, into memory.
#include "cpu/normals.h"

#include "cpu/normals_loop.h"

namespace bkd {
namespace BKD_ISA {
namespace {

// out[0 .. count) of any run, from each(out, count, block), which makes whole runs of the noise loop.
template <class T, class Each> BKD_INLINE void any_run(T* out, int64_t count, uint64_t first_element, Each&& each) {
  constexpr int64_t kBuffer = 1024;
  alignas(64) T buffer[kBuffer];
  while (count > 0) {
    const uint64_t block = first_element >> 2;
    const int64_t skip = (int64_t)(first_element & 3);
    // a run ends with the buffer, or before the low word of the block number wraps
    const uint64_t until_wrap = 4 * ((UINT64_C(1) << 32) - (block & 0xFFFFFFFFu));
    const int64_t room = until_wrap < (uint64_t)kBuffer ? (int64_t)until_wrap : kBuffer;
    const int64_t take = count < room - skip ? count : room - skip;
    each(buffer, (skip + take + kNoiseRun - 1) / kNoiseRun * kNoiseRun, block);
    memcpy(out, buffer + skip, (size_t)take * sizeof(T));
    out += take;
    count -= take;
    first_element += (uint64_t)take;
  }
}

}  // namespace

void normals(float* out, int64_t count, const Stream& stream, uint64_t first_element) {
  any_run(out, count, first_element, [&](float* to, int64_t made, uint64_t block) {
    each_normal(made, stream, block, [&](int64_t i, Floats z) { store(to + i, z); });
  });
}

void words(int32_t* out, int64_t count, const Stream& stream, uint64_t first_element) {
  any_run(out, count, first_element, [&](int32_t* to, int64_t made, uint64_t block) {
    each_word(made, stream, block, [&](int64_t i, Ints w) { store(to + i, w); });
  });
}

}  // namespace BKD_ISA
}  // namespace bkd
