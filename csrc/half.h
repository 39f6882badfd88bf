// bfloat16 and IEEE half as 16-bit storage: exact widening, narrowing to nearest even. Arithmetic is in float.
#pragma once
#include "common.h"

namespace bkd {

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

enum class Storage { float32, float64, bfloat16, float16 };  // what a tensor of reals is made of

BKD_HD float widen(float x) { return x; }
BKD_HD double widen(double x) { return x; }
BKD_HD float widen(BFloat16 x) { return as_float((uint32_t)x.bits << 16); }
BKD_HD float widen(Half x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16, magnitude = (uint32_t)(x.bits & 0x7FFFu) << 13;
  // the exponent is rebiased by a multiplication, which normalises subnormals too
  const float value = as_float(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0F800000u ? 0x7F800000u | magnitude : as_bits(value);
  return as_float(sign | special);
}

BKD_HD void narrow(float x, float& out) { out = x; }
BKD_HD void narrow(double x, double& out) { out = x; }
BKD_HD void narrow(float x, BFloat16& out) {
  const uint32_t b = as_bits(x);
  const uint32_t rounded = (b + 0x7FFFu + (b >> 16 & 1u)) >> 16;
  const uint32_t quiet = b >> 16 | 0x40u;
  out.bits = (uint16_t)((b & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}
BKD_HD void narrow(float x, Half& out) {
  const uint32_t b = as_bits(x), sign = b >> 16 & 0x8000u, magnitude = b & 0x7FFFFFFFu;
  // normal: drop 13 bits to nearest even and rebias; subnormal: adding 0.5 aligns and rounds the significand by the adder
  const uint32_t normal = (magnitude + 0xFFFu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t infinite = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  out.bits = (uint16_t)(sign | (magnitude >= 0x477FF000u ? infinite : finite));
}

BKD_HD bool is_finite(float x) { return (as_bits(x) & 0x7F800000u) != 0x7F800000u; }
BKD_HD bool is_finite(double x) { return x - x == 0.0; }
BKD_HD bool is_finite(BFloat16 x) { return (x.bits & 0x7F80u) != 0x7F80u; }
BKD_HD bool is_finite(Half x) { return (x.bits & 0x7C00u) != 0x7C00u; }

}  // namespace bkd
