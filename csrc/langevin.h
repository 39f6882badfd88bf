// One element of a Langevin step. Written once for every number type: float, double, or a SIMD vector of floats.
//
//   theta <- theta - lr (grad + decay (theta - center)) + sigma xi
//
// decay = prior_precision / num_data and sigma = sqrt(2 lr temperature / num_data) are rounded to the arithmetic's type once,
// on the host. The order of operations is part of the contract: one fp32 step is bit-equal on every backend, and at
// sigma = 0 it is torch.optim.SGD(foreach=False).
//
// 16-bit parameters are widened, stepped in float32, and brought back to 16 bits in one of three ways:
//   nearest     round to nearest even: the whole story at sigma = 0; noise below half the spacing is lost.
//   stochastic  drifted = the value before the noise; sigma = noise_table[exponent_field(drifted)]; y = fma(sigma, xi, drifted);
//               then, where y replaces the old value, round_stochastically(y, random) of half.h with random = the upper 16
//               bits of word (element & 3) of the element's Philox block, at the coordinates of xi but with
//               Tag::stochastic_rounding (noise.h).
//   master      a float32 copy takes the step in theta's place, bit for bit that of a float32 parameter with this gradient
//               widened; theta is the copy rounded to nearest even.
// Running moments are of what holds the chain: theta after its rounding, or the master.
//
// noise_table has the 16-bit type's 2^8 (bfloat16) or 2^5 (float16) exponent fields; bkd_fast/ops/rounding.py makes it, so that
// the noise and the rounding together have the variance 2 lr temperature / num_data.
#pragma once
#include "common.h"
#include "half.h"

#ifdef BKD_ISA  // a CPU kernel: the vector operations must be known where the templates are defined
#include "cpu/simd.h"
namespace bkd {
namespace BKD_ISA {
#else
namespace bkd {
#endif

// Gradient of the mean loss plus the Gaussian prior's share of it.
template <class V> BKD_HD V prior_gradient(V theta, V gradient, V center, V decay) {
  return fma(decay, sub(theta, center), gradient);
}
template <class V> BKD_HD V prior_gradient(V theta, V gradient, V decay) { return fma(decay, theta, gradient); }

// SGLD (Welling and Teh, 2011).
template <class V> BKD_HD V sgld_drift(V theta, V gradient, V minus_lr) { return fma(minus_lr, gradient, theta); }
template <class V> BKD_HD V sgld(V theta, V gradient, V noise, V minus_lr, V sigma) {
  return fma(sigma, noise, sgld_drift(theta, gradient, minus_lr));
}

// The same for a 16-bit type T, before its stochastic rounding.
template <class T>
BKD_HD float sgld_to_round(float theta, float gradient, float noise, float minus_lr, const float* noise_table) {
  const float drifted = sgld_drift(theta, gradient, minus_lr);
  return fma(noise_table[exponent_field(drifted, T{})], noise, drifted);
}

// Welford's running mean and sum of squared deviations; inverse_count = 1 / n with n the draws including this one.
template <class V> struct Moments { V mean, m2; };
template <class V> BKD_HD Moments<V> add_draw(Moments<V> m, V theta, V inverse_count) {
  const V delta = sub(theta, m.mean);
  const V mean = fma(delta, inverse_count, m.mean);
  return {mean, fma(delta, sub(theta, mean), m.m2)};
}

#ifdef BKD_ISA
}  // namespace BKD_ISA
#endif
}  // namespace bkd
