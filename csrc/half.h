// bfloat16 and IEEE half as 16-bit storage: exact widening, narrowing to nearest even. Arithmetic is in float. A GPU converts in
// one instruction; there a NaN may come out with other bits.
#pragma once
#include "common.h"

namespace bkd {

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

enum class Storage { float32, float64, bfloat16, float16 };  // what a tensor of reals is made of
constexpr int size_of(Storage s) { return s == Storage::float64 ? 8 : s == Storage::float32 ? 4 : 2; }

BKD_HD float widen(float x) { return x; }
BKD_HD double widen(double x) { return x; }
BKD_HD float widen(BFloat16 x) { return as_float((uint32_t)x.bits << 16); }
BKD_HD float widen(Half x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16, magnitude = (uint32_t)(x.bits & 0x7FFFu) << 13;
  // the exponent is rebiased by a multiplication, which normalises subnormals too
  const float value = as_float(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0F800000u ? 0x7F800000u | magnitude : as_bits(value);
  return as_float(sign | special);
#endif
}

BKD_HD void narrow(float x, float& out) { out = x; }
BKD_HD void narrow(double x, double& out) { out = x; }
BKD_HD void narrow(float x, BFloat16& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t b = as_bits(x);
  const uint32_t rounded = (b + 0x7FFFu + (b >> 16 & 1u)) >> 16;
  const uint32_t quiet = b >> 16 | 0x40u;
  out.bits = (uint16_t)((b & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
#endif
}
BKD_HD void narrow(float x, Half& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t b = as_bits(x), sign = b >> 16 & 0x8000u, magnitude = b & 0x7FFFFFFFu;
  // normal: drop 13 bits to nearest even and rebias; subnormal: adding 0.5 aligns and rounds the significand by the adder
  const uint32_t normal = (magnitude + 0xFFFu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t infinite = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  out.bits = (uint16_t)(sign | (magnitude >= 0x477FF000u ? infinite : finite));
#endif
}

// The exponent field, as the 16-bit type stores it, of x rounded toward zero to that type: 0..254, 0..30 where x is finite. An
// infinity or NaN may give any of the type's fields: nothing that is looked up for it can change it.
BKD_HD uint32_t exponent_field(float x, BFloat16) { return as_bits(x) >> 23 & 0xFFu; }
BKD_HD uint32_t exponent_field(float x, Half) {
  const int32_t rebiased = (int32_t)(as_bits(x) >> 23 & 0xFFu) - 112;
  return (uint32_t)(rebiased < 0 ? 0 : rebiased > 30 ? 30 : rebiased);
}

BKD_HD uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
BKD_HD uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Stochastic rounding to 16 bits; `random` is uniform on 0 .. 65535. With u the spacing of the type below |x|:
//
//   q = |x| / u,  |out| = u (floor(q) + 1)  if floor(65536 frac(q)) + random >= 65536,  else u floor(q);  the sign is x's
//
// so representable values stay and the expectation is x (but for float16 below 2^-17: there within u / 65536 of it). A finite
// |out| stops at the type's largest finite number; infinities and NaNs are stored as they are (a NaN as its leading bits: it is
// quiet after any arithmetic). It is arithmetic on x's bits: 8 operations for bfloat16, 20 for float16.
BKD_HD void round_stochastically(float x, uint32_t random, BFloat16& out) {
  const uint32_t b = as_bits(x), sign = b >> 16 & 0x8000u, magnitude = b & 0x7FFFFFFFu;
  const uint32_t finite = smaller(magnitude + random, 0x7F7FFFFFu);  // carries into the next binade as the numbers do
  out.bits = (uint16_t)(sign | larger(finite, magnitude) >> 16);  // magnitude is the larger where not finite
}
BKD_HD void round_stochastically(float x, uint32_t random, Half& out) {
  const uint32_t b = as_bits(x), sign = b >> 16 & 0x8000u, magnitude = b & 0x7FFFFFFFu;
  const uint32_t normal = (smaller(magnitude + (random >> 3), 0x477FFFFFu) - 0x38000000u) >> 13;
  // below 2^-14 the spacing is 2^-24: fixed point with 16 fractional bits, truncated; the clamp keeps the conversion in range
  const uint32_t fixed = (uint32_t)(int32_t)(as_float(smaller(magnitude, 0x387FFFFFu)) * 0x1p40f);
  const uint32_t finite = magnitude < 0x38800000u ? (fixed + random) >> 16 : normal;
  const uint32_t special = magnitude >> 13 & 0x7FFFu;
  out.bits = (uint16_t)(sign | (magnitude < 0x7F800000u ? finite : special));
}

BKD_HD bool is_finite(float x) { return (as_bits(x) & 0x7F800000u) != 0x7F800000u; }
BKD_HD bool is_finite(double x) { return x - x == 0.0; }
BKD_HD bool is_finite(BFloat16 x) { return (x.bits & 0x7F80u) != 0x7F80u; }
BKD_HD bool is_finite(Half x) { return (x.bits & 0x7C00u) != 0x7C00u; }

}  // namespace bkd
