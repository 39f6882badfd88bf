// exp2 and log of vectors of floats, to within a float's own rounding, for the instruction set of this file.
#pragma once
#include "../kd.h"
#include "cpu/simd.h"

namespace bkd {
namespace BKD_ISA {

// a b + c, a b - c and c - a b, fused where that is one instruction: nothing here depends on the rounding of the product, and
// without the instruction an exact fma is a call into the C library.
#if defined(BKD_ISA_scalar)
BKD_INLINE Floats mul_add(Floats a, Floats b, Floats c) { return {a.x * b.x + c.x}; }
BKD_INLINE Floats mul_sub(Floats a, Floats b, Floats c) { return {a.x * b.x - c.x}; }
BKD_INLINE Floats sub_mul(Floats a, Floats b, Floats c) { return {c.x - a.x * b.x}; }
#else
BKD_INLINE Floats mul_add(Floats a, Floats b, Floats c) { return fma(a, b, c); }
BKD_INLINE Floats mul_sub(Floats a, Floats b, Floats c) { return fms(a, b, c); }
BKD_INLINE Floats sub_mul(Floats a, Floats b, Floats c) { return fnma(a, b, c); }
#endif

// 2^y for y <= 0: relative error 9e-8, 0 for y = -inf, NaN for NaN. Results below 2^-126 are 0, or subnormal on AVX-512.
#if defined(BKD_ISA_avx512)
BKD_INLINE Floats exp2_nonpositive(Floats y) {
  // scalef multiplies by 2^floor(y), which leaves a polynomial on [0, 1): 1 + r P(r), minimax, relative error 8.3e-8
  const Floats r = _mm512_reduce_ps(y, 0x09);
  Floats p = set1(0x1.e97506p-10f);
  p = fma(p, r, set1(0x1.277852p-7f));
  p = fma(p, r, set1(0x1.c91ce6p-5f));
  p = fma(p, r, set1(0x1.ebdb56p-3f));
  p = fma(p, r, set1(0x1.62e4bap-1f));
  p = fma(p, r, set1(1.0f));
  return _mm512_scalef_ps(p, y);
}
#elif defined(BKD_ISA_avx2)
BKD_INLINE Floats exp2_nonpositive(Floats y) {
  const Floats smallest = set1(kExp2Smallest), round = set1(kRoundToInteger);
  const Floats clamped = _mm256_max_ps(smallest, y);  // in this order a NaN stays
  const Floats shifted = add(clamped, round);
  const Floats r = sub(clamped, sub(shifted, round));
  Floats p = set1(kExp2[0]);
  for (int k = 1; k < 6; ++k) p = fma(p, r, set1(kExp2[k]));
  const Floats scaled = as_floats(add(as_ints(p), shift_left<23>(as_ints(shifted))));
  return _mm256_andnot_ps(less(y, smallest).m, scaled);
}
#else
BKD_INLINE Floats exp2_nonpositive(Floats y) {
  const float clamped = y.x < kExp2Smallest ? kExp2Smallest : y.x;
  const float shifted = clamped + kRoundToInteger;
  const float r = clamped - (shifted - kRoundToInteger);
  float p = kExp2[0];
  for (int k = 1; k < 6; ++k) p = p * r + kExp2[k];
  return {y.x < kExp2Smallest ? 0.0f : as_float(as_bits(p) + (as_bits(shifted) << 23))};
}
#endif

// ln x of positive, finite, normal x: x = m 2^e with m in [3/4, 3/2); ln m = 2 artanh(s), s = (m - 1) / (m + 1), |s| <= 1/5.
BKD_INLINE Floats log_positive(Floats x) {
  const Ints three_quarters = set1i(0x3F400000);
  const Ints exponent = shift_right<23>(sub(as_ints(x), three_quarters));
  const Floats m = as_floats(sub(as_ints(x), shift_left<23>(exponent)));
  const Floats s = div(sub(m, set1(1.0f)), add(m, set1(1.0f)));
  const Floats w = mul(s, s);
  Floats p = mul_add(set1(2.0f / 11), w, set1(2.0f / 9));
  p = mul_add(p, w, set1(2.0f / 7));
  p = mul_add(p, w, set1(2.0f / 5));
  p = mul_add(p, w, set1(2.0f / 3));
  p = mul_add(mul(p, w), s, add(s, s));
  return mul_add(to_float(exponent), set1(kLn2), p);
}

}  // namespace BKD_ISA
}  // namespace bkd
