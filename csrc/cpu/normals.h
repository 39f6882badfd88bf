// The noise of noise.h for runs of elements, into memory: normals, and the random words themselves.
#pragma once
#include "../noise.h"
#include "cpu/dispatch.h"

namespace bkd {

// out[0 .. count) = the noise of elements first_element ..., any first element and count.
BKD_DECLARE(void, normals, (float* out, int64_t count, const Stream& stream, uint64_t first_element))

// out[0 .. count) = word (element & 3) of the block of each element first_element ...
BKD_DECLARE(void, words, (int32_t* out, int64_t count, const Stream& stream, uint64_t first_element))

}  // namespace bkd
