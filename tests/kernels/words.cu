// What csrc/noise.h makes of given words: for variants_words.py and, on a GPU, tests/gpu/test_gpu_radius.py.
#include "noise.h"

namespace bkd {

__global__ void normals_of_words(const uint32_t* radius, const uint32_t* angle, float* first, float* second) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const Pair pair = normals_of(radius[i], angle[i]);
  first[i] = pair.z0;
  second[i] = pair.z1;
}

// Every radius that there is: integers below 2^24, then the float32 numbers up to 2^31, by thread number. Counts those whose
// root is not the correctly rounded one, and keeps the first of them.
__global__ void roots_that_differ(uint32_t radii, uint32_t* count, uint32_t* first, uint32_t room) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= radii) return;
  const uint32_t below = i - (1u << 24);
  const uint32_t word = i < 1u << 24 ? i : ((below & 0x7FFFFFu) | 0x800000u) << ((below >> 23) + 1);
  const float x = radius_squared(word);
  if (as_bits(radius_root(x)) != as_bits(__fsqrt_rn(x))) {
    const uint32_t place = atomicAdd(count, 1u);
    if (place < room) first[place] = word;
  }
}

}  // namespace bkd
