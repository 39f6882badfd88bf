// One element of a sampler's step. Written once for every number type: float, double, or a SIMD vector of floats.
//
//   g = grad + decay (theta - center)          then a rule, of which SGLD's is    theta <- theta - lr g + sigma xi
//
// The other rules, one function each below, have state of their own: a momentum, a second moment, a thermostat. Their numbers
// (lr, decay, sigma and up to six of the rule's own) are rounded to the arithmetic's type once, on the host. The order of
// operations is part of the contract: one fp32 step is bit-equal on every backend, and at sigma = 0 SGLD and SGHMC are
// torch.optim.SGD(foreach=False). Where sigma is 0 the noise is -0: adding its multiples changes nothing, not even a zero's sign.
//
// 16-bit parameters are widened, stepped in float32 (their state is in float32 too), and brought back to 16 bits in one of
// three ways:
//   nearest     round to nearest even: the whole story at sigma = 0; noise below half the spacing is lost.
//   stochastic  SGLD only. drifted = the value before the noise; sigma = noise_table[exponent_field(drifted)];
//               y = fma(sigma, xi, drifted); then, where y replaces the old value, round_stochastically(y, random) of half.h
//               with random = the upper 16 bits of word (element & 3) of the element's Philox block, at the coordinates of xi
//               but with Tag::stochastic_rounding (noise.h).
//   master      a float32 copy takes the step in theta's place, bit for bit that of a float32 parameter with this gradient
//               widened; theta is the copy rounded to nearest even.
// Running moments are of what holds the chain: theta after its rounding, or the master.
//
// noise_table has the 16-bit type's 2^8 (bfloat16) or 2^5 (float16) exponent fields; bkd_fast/ops/rounding.py makes it, so that
// the noise and the rounding together have the variance 2 lr temperature / num_data.
//
// A new rule: its name and states in rules.h and bkd_fast/ops/rules.py, its function and a line in advance() here, and the same
// function in the languages of the reference (bkd_fast/ops/reference/rules.py) and of Triton (kernels/rules.py).
#pragma once
#include "common.h"
#include "half.h"
#include "rules.h"

#ifdef BKD_ISA  // a CPU kernel: the vector operations must be known where the templates are defined
#include "cpu/simd.h"
namespace bkd {
namespace BKD_ISA {
#else
namespace bkd {
#endif

// What a step reads and writes of one element, beside its gradient.
template <class V> struct Element { V theta, first, second; };

// What is the same for a whole tensor, rounded once.
template <class V> struct Numbers { V minus_lr, sigma, own[kOwnNumbers]; };

// Gradient of the mean loss plus the Gaussian prior's share of it.
template <class V> BKD_HD V prior_gradient(V theta, V gradient, V center, V decay) {
  return fma(decay, sub(theta, center), gradient);
}
template <class V> BKD_HD V prior_gradient(V theta, V gradient, V decay) { return fma(decay, theta, gradient); }

// SGLD (Welling and Teh, ICML 2011).
template <class V> BKD_HD V sgld_drift(V theta, V g, V minus_lr) { return fma(minus_lr, g, theta); }
template <class V> BKD_HD void sgld(Element<V>& e, V g, V noise, const Numbers<V>& n) {
  e.theta = fma(n.sigma, noise, sgld_drift(e.theta, g, n.minus_lr));
}

// The same for a 16-bit type T, before its stochastic rounding.
template <class T>
BKD_HD float sgld_to_round(float theta, float g, float noise, float minus_lr, const float* noise_table) {
  const float drifted = sgld_drift(theta, g, minus_lr);
  return fma(noise_table[exponent_field(drifted, T{})], noise, drifted);
}

// SGHMC (Chen, Fox and Guestrin, ICML 2014) as torch.optim.SGD has its momentum. first: the momentum buffer b.
// own: momentum, 1 - dampening.
template <class V> BKD_HD V momentum(V b, V g, V noise, const Numbers<V>& n) {
  return fma(n.sigma, noise, fma(n.own[1], g, mul(n.own[0], b)));
}
template <class V> BKD_HD void sghmc(Element<V>& e, V g, V noise, const Numbers<V>& n) {
  e.first = momentum(e.first, g, noise, n);
  e.theta = fma(n.minus_lr, e.first, e.theta);
}
// Nesterov's: temperature 0 only.
template <class V> BKD_HD void nesterov(Element<V>& e, V g, V noise, const Numbers<V>& n) {
  e.first = momentum(e.first, g, noise, n);
  e.theta = fma(n.minus_lr, fma(n.own[0], e.first, g), e.theta);
}

// SGLD preconditioned by G = 1 / (sqrt(v) + eps), v the running mean of g^2 (Li, Chen, Carlson and Carin, AAAI 2016): every
// coordinate has the step size lr G. first: v. own: alpha, 1 - alpha, eps.
template <class V> BKD_HD void rmsprop(Element<V>& e, V g, V noise, const Numbers<V>& n) {
  e.first = fma(mul(n.own[1], g), g, mul(n.own[0], e.first));
  const V root_of_metric = reciprocal(root(add(root(e.first), n.own[2])));
  e.theta = fma(root_of_metric, fma(n.sigma, noise, mul(n.minus_lr, mul(root_of_metric, g))), e.theta);
}

// SGHMC with dampening = momentum, every coordinate at the step size lr G of Adam (Kingma and Ba, ICLR 2015): at sigma = 0 it is
// Adam. first: m, second: v. lr is Adam's over its bias correction 1 - beta1^t.
// own: beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 / sqrt(1 - beta2^t).
template <class V> BKD_HD void adam(Element<V>& e, V g, V noise, const Numbers<V>& n) {
  e.second = fma(mul(n.own[3], g), g, mul(n.own[2], e.second));
  const V inverse_metric = fma(root(e.second), n.own[5], n.own[4]);
  e.first = fma(mul(n.sigma, root(inverse_metric)), noise, fma(n.own[1], g, mul(n.own[0], e.first)));
  e.theta = fma(n.minus_lr, div(e.first, inverse_metric), e.theta);
}

// SGNHT (Ding et al., NIPS 2014), a thermostat for every element (Gan et al., ICML 2015): the momentum mu that SGHMC would be
// given follows b so that lr N (1 + mu) b^2 / 2 is T on average. first: b, second: mu.
// own: -rate lr N / (2 T), rate.
template <class V> BKD_HD void sgnht(Element<V>& e, V g, V noise, const Numbers<V>& n) {
  e.first = fma(n.sigma, noise, add(g, mul(e.second, e.first)));
  e.theta = fma(n.minus_lr, e.first, e.theta);
  const V square = mul(e.first, e.first);
  e.second = add(fma(n.own[0], fma(square, e.second, square), e.second), n.own[1]);
}

// BAOAB with merged kicks (Leimkuhler and Matthews, 2013): kick, half a drift, friction and noise, half a drift. first: the
// momentum p of mass 1. minus_lr is -sqrt(lr N). own: exp(-friction h), h / 2 with h = sqrt(lr / N).
template <class V> BKD_HD void baoab(Element<V>& e, V g, V noise, const Numbers<V>& n) {
  const V kicked = fma(n.minus_lr, g, e.first);
  e.first = fma(n.sigma, noise, mul(n.own[0], kicked));
  e.theta = fma(n.own[1], e.first, fma(n.own[1], kicked, e.theta));
}

template <Rule rule, class V> BKD_HD void advance(Element<V>& e, V g, V noise, const Numbers<V>& n) {
  if constexpr (rule == Rule::sgld) sgld(e, g, noise, n);
  if constexpr (rule == Rule::sghmc) sghmc(e, g, noise, n);
  if constexpr (rule == Rule::nesterov) nesterov(e, g, noise, n);
  if constexpr (rule == Rule::rmsprop) rmsprop(e, g, noise, n);
  if constexpr (rule == Rule::adam) adam(e, g, noise, n);
  if constexpr (rule == Rule::sgnht) sgnht(e, g, noise, n);
  if constexpr (rule == Rule::baoab) baoab(e, g, noise, n);
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
