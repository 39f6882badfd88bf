// One element of a Langevin step. Written once for every number type: float, double, or a SIMD vector of floats.
//
//   theta <- theta - lr (grad + decay (theta - center)) + sigma xi
//
// decay = prior_precision / num_data and sigma = sqrt(2 lr temperature / num_data) are rounded to the arithmetic's type once,
// on the host. The order of operations is part of the contract: one fp32 step is bit-equal on every backend, and at
// sigma = 0 it is torch.optim.SGD(foreach=False).
#pragma once
#include "common.h"

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
