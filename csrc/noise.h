// The noise xi(seed, chain, step, parameter, element): Philox4x32-10 words, polynomial Box-Muller normals.
//
// This header is the specification: every other implementation (SIMD, NumPy, Triton, CUDA) returns the same bits.
// Counter layout (injective; limits in brackets):
//   key = seed [2^64]
//   c0  = block[31:0]                                       block = element >> 2      [element < 2^38]
//   c1  = step[31:0]                                                                  [step < 2^44]
//   c2  = chain[19:0] << 12 | step[43:32]                                             [chain < 2^20]
//   c3  = tag[3:0] << 28 | block[35:32] << 24 | parameter[23:0]                       [parameter < 2^24]
// Words (w0, w1) of a block make elements 4 block and 4 block + 1, words (w2, w3) the two after.
#pragma once
#include "common.h"

namespace bkd {

// What a stream of noise is for: equal coordinates with different tags are independent.
enum class Tag : uint32_t { langevin = 0, stochastic_rounding = 1, initial_momentum = 2, second_normal = 3, data_order = 4 };

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // Salmon et al., SC 2011
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Everything of a counter and key that a whole tensor shares.
struct Stream {
  uint64_t seed;
  uint64_t step;
  uint32_t chain;
  uint32_t parameter;
  uint32_t tag;
};

struct Words {
  uint32_t w[4];
};

BKD_HD Words counter_of(const Stream& s, uint64_t block) {
  return {{(uint32_t)block, (uint32_t)s.step, s.chain << 12 | (uint32_t)(s.step >> 32),
           s.tag << 28 | (uint32_t)(block >> 32) << 24 | s.parameter}};
}

BKD_HD Words philox(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = multiply_wide(kPhiloxM0, c.w[0]), p1 = multiply_wide(kPhiloxM1, c.w[2]);
    c = {{(uint32_t)(p1 >> 32) ^ c.w[1] ^ k0, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ c.w[3] ^ k1, (uint32_t)p0}};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

BKD_HD Words words_of(const Stream& s, uint64_t block) {
  return philox(counter_of(s, block), (uint32_t)s.seed, (uint32_t)(s.seed >> 32));
}

// ---- words to normals ----
// Radius sqrt(-2 ln u), u = m 2^-31: the logarithm is y * A + q(t), with y the distance below u = 1 in 2^-23 octaves (the
// float's own bits are a piecewise linear log2) and q the polynomial that corrects it inside an octave.
constexpr float kRadiusQ[7] = {-0x1.8b8e68p-2f, 0x1.ff5aa2p-3f, 0x1.626562p-4f, 0x1.1b0e12p-6f,
                               0x1.5ff422p-5f,  -0x1.cdaf1cp-6f, 0x1.2731b2p-6f};
constexpr float kRadiusEps = 0x1p-42f;  // keeps the square root's argument positive at u = 1
constexpr float kRadiusA = 0x1.62e43p-23f;
// cos and sin of pi w for |w| <= 1/2, even and odd polynomials: half a turn; the radius carries the sign of the other half.
constexpr float kCos[5] = {0x1.fffffep-1f, -0x1.3bd3a4p+2f, 0x1.03bcfcp+2f, -0x1.54f5e8p+0f, 0x1.c1f36ap-3f};
constexpr float kSin[5] = {0x1.921fb4p+1f, -0x1.4abba2p+2f, 0x1.466504p+1f, -0x1.31fbf4p-1f, 0x1.3912a8p-4f};
constexpr float kSmallestM = 0.25f;  // word 0 would be u = 0

struct Pair {
  float z0, z1;
};

// -2 ln u of the radius word, u in (0, 1]: at least 2^-42, at most 45.75.
BKD_HD float radius_squared(uint32_t word) {
  const float magnitude = absolute((float)(int32_t)word);
  const float m = magnitude > kSmallestM ? magnitude : kSmallestM;
  const uint32_t j = 0x4F000000u - as_bits(m);
  const float y = (float)(int32_t)j;
  const float t = as_float((j & 0x007FFFFFu) | 0x3F800000u) - 1.0f;
  float q = kRadiusQ[6];
  for (int k = 5; k >= 0; --k) q = fma(q, t, kRadiusQ[k]);
  q = fma(q, t, kRadiusEps);
  return fma(y, kRadiusA, q);
}

// The square root to nearest, for what radius_squared() returns.
BKD_HD float radius_root(float x) {
#if defined(__CUDA_ARCH__)
  // what the compiler's own square root does for such x, without the test for others: an approximate 1 / sqrt(x), documented to
  // 2^-22.9, and one correction. Any such approximation gives the rounded root of every radius but four, |word| = 309, 1241789,
  // 0x1.3f19aap+25 and 0x1.414b38p+30: those need one that is not a unit too large. tests/gpu/test_gpu_radius.py tells.
  float reciprocal;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  const float root = x * reciprocal;
  return fma(fma(-root, root, x), 0.5f * reciprocal, root);
#else
  return __builtin_sqrtf(x);
#endif
}

BKD_HD Pair normals_of(uint32_t radius_word, uint32_t angle_word) {
  const float radius = radius_root(radius_squared(radius_word));
  const float signed_radius = as_float(as_bits(radius) | (radius_word & 0x80000000u));
  const float w = (float)(int32_t)angle_word * 0x1p-32f;
  const float v = w * w;
  float c = kCos[4], s = kSin[4];
  for (int k = 3; k >= 0; --k) c = fma(c, v, kCos[k]);
  for (int k = 3; k >= 0; --k) s = fma(s, v, kSin[k]);
  return {signed_radius * c, (signed_radius * w) * s};
}

}  // namespace bkd
