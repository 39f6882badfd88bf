// exp of numbers <= 0 and log of positive numbers in explicit fma, the same bits on every instruction set and on GPUs:
// relative error about 1e-7 (Cephes' polynomials).
#pragma once
#ifdef BKD_ISA  // a CPU kernel: vectors
#include "cpu/simd.h"
namespace bkd {
namespace BKD_ISA {
#else
#include "scalar.h"
namespace bkd {
#endif

constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // their sum is ln 2; the first has few bits
constexpr float kExpLowest = -87.0f;                                  // below, exp is taken as 0

struct Exponential {
  Floats value;
  Floats argument;  // not below kExpLowest, so that value * argument is 0 and no NaN where the logit is -inf
};

// NaN stays NaN.
BKD_HD Exponential exp_nonpositive(Floats x) {
  const Floats magic = set1(12582912.0f);  // 1.5 * 2^23: rounds to an integer, which the low bits then hold
  const Floats lowest = set1(kExpLowest);
  const Floats argument = max(lowest, x);
  const Floats shifted = fma(argument, set1(1.44269504f), magic);
  const Floats octaves = sub(shifted, magic);
  Floats f = fnma(octaves, set1(kLn2High), argument);
  f = fnma(octaves, set1(kLn2Low), f);
  // even and odd powers apart: half the chain of dependent operations
  const Floats square = mul(f, f);
  const Floats even = fma(fma(set1(1.3981999507e-3f), square, set1(4.1665795894e-2f)), square, set1(5.0000001201e-1f));
  const Floats odd = fma(fma(set1(1.9875691500e-4f), square, set1(8.3334519073e-3f)), square, set1(1.6666665459e-1f));
  const Floats y = add(fma(fma(odd, f, even), square, f), set1(1.0f));
  const Floats scaled = as_floats(add(as_ints(y), shift_left<23>(as_ints(shifted))));
  return {select(less(x, lowest), set1(0.0f), scaled), argument};
}

// Below the smallest normal number it is some number near -88, as for 0.
BKD_HD Floats log_positive(Floats x) {
  const Ints i = as_ints(x);
  const Ints octaves = shift_right<23>(sub(i, set1i(0x3f3504f3)));  // relative to sqrt(1/2)
  const Floats f = sub(as_floats(sub(i, shift_left<23>(octaves))), set1(1.0f));
  const Floats k = to_float(octaves), z = mul(f, f);
  Floats even = fma(set1(7.0376836292e-2f), z, set1(1.1676998740e-1f));
  Floats odd = fma(set1(-1.1514610310e-1f), z, set1(-1.2420140846e-1f));
  even = fma(even, z, set1(1.4249322787e-1f));
  odd = fma(odd, z, set1(-1.6668057665e-1f));
  even = fma(even, z, set1(2.0000714765e-1f));
  odd = fma(odd, z, set1(-2.4999993993e-1f));
  even = fma(even, z, set1(3.3333331174e-1f));
  Floats y = mul(fma(odd, f, even), mul(f, z));
  y = fma(k, set1(kLn2Low), y);
  y = fma(z, set1(-0.5f), y);
  return fma(k, set1(kLn2High), add(f, y));
}

#ifdef BKD_ISA
}  // namespace BKD_ISA
#endif
}  // namespace bkd
