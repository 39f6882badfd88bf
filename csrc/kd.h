// The KD energy of one row of logits and its gradient: every prior, every kind of label, plainly, in float or double.
//
// With student logits z, teacher distribution p_T and temperature T,
//   q = softmax(z),  q_T = softmax(z / T),
//   energy = label_weight CE(y', q) + prior(q_T, p_T),      y' = (1 - s) y + s uniform      (s: label smoothing)
// The prior's energy is minus the log density of q_T (Fang et al., ICML 2024; methods in docs/methods.md). A logit of -inf
// masks its class: it has no probability, no share of the smoothing and no gradient.
#pragma once
#include "common.h"

namespace bkd {

enum class Prior : int { none = 0, dirichlet = 1, continuous_categorical = 2, reverse_kl = 3, mixture = 4 };

// What can be wrong with the numbers of a row. The order is the order of the checks.
enum class Fault : int {
  none = 0,
  logits_not_finite,          // NaN or +inf
  logits_all_masked,          // nothing but -inf
  teacher_not_finite,         // teacher logits: NaN or +inf
  teacher_all_masked,         // teacher logits: nothing but -inf
  teacher_not_probabilities,  // teacher probabilities: negative, NaN, or a sum that is not 1
  teacher_on_masked_class,    // the teacher expects a class that the student cannot give: infinite energy
  teacher_excludes_class,     // log p of a class that the student may give is -inf: infinite energy
  weights_not_probabilities,  // mixture weights: negative, NaN, or a sum that is not 1
  target_out_of_range,        // neither a class nor ignore_index
  target_not_probabilities,   // soft labels: negative, NaN, or a sum that is not 1
  target_on_masked_class,     // a label on a class that the student cannot give: infinite energy
  // of a top-k teacher, and looked for before anything but the label
  teacher_index_out_of_range,  // not a class
  teacher_index_repeated,      // a class that the row has named before
  // of signed soft labels, in the place of target_not_probabilities
  target_sum_not_one,          // not finite, or a sum that is not 1
};

// What all rows of a call share.
struct KdSettings {
  int64_t classes;
  int64_t teachers;        // distributions per row: 1, or more for the mixture
  Prior prior;
  bool teacher_is_probs;   // probabilities, not logits
  double prior_strength;   // lambda
  double temperature;      // T
  double label_weight;
  double label_smoothing;
  double sum_tolerance_teacher;  // how far from 1 a row of probabilities may sum
  double sum_tolerance_target;
  bool signed_target;      // soft labels may be negative
  double scale;            // factor of the gradient: 1, or 1 / rows for a mean
};

// One row's inputs, widened. What is absent is null.
template <class Real>
struct KdRow {
  const Real* logits;   // (classes)
  const Real* teacher;  // (teachers, classes)
  const Real* weights;  // (teachers) mixture weights; null: the entropy weights
  const Real* soft;     // (classes) soft label
  int64_t label;        // hard label, -1 for none
};

constexpr float kLog2e = 0x1.715476p+0f;
constexpr float kLn2 = 0x1.62e43p-1f;
constexpr double kInfinity = __builtin_inf();

// 2^r on [-1/2, 1/2], relative error 8e-8: coefficients from the highest power down; the last is 1.
constexpr float kExp2[6] = {0x1.5bba14p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.0f};
constexpr float kRoundToInteger = 0x1.8p23f;  // adding it leaves the nearest integer in the low mantissa bits
constexpr float kExp2Smallest = -126.0f;      // below it 2^y is subnormal, and counts as 0

// exp(x) for x <= 0; NaN stays NaN. A plain sequence of multiplications and additions, so that loops over it vectorise.
BKD_HD float exp_nonpositive(float x) {
  const float y = x * kLog2e;
  const float clamped = y < kExp2Smallest ? kExp2Smallest : y;
  const float shifted = clamped + kRoundToInteger;
  const float r = clamped - (shifted - kRoundToInteger);
  float p = kExp2[0];
  for (int k = 1; k < 6; ++k) p = p * r + kExp2[k];
  const float scaled = as_float(as_bits(p) + (as_bits(shifted) << 23));
  return y < kExp2Smallest ? 0.0f : scaled;
}
BKD_HD double exp_nonpositive(double x) { return __builtin_exp(x); }
BKD_HD float log_of(float x) { return __builtin_logf(x); }
BKD_HD double log_of(double x) { return __builtin_log(x); }

// ln Gamma(1 + a), a >= 0: Stirling's series at an argument shifted to at least 8 (error below 1e-12).
BKD_HD double log_gamma_1p(double a) {
  double x = 1.0 + a, product = 1.0;
  for (; x < 8.0; x += 1.0) product *= x;
  const double w = 1.0 / (x * x);
  const double series = 1.0 / 12 + w * (-1.0 / 360 + w * (1.0 / 1260 + w * (-1.0 / 1680 + w * (1.0 / 1188 - w * 691.0 / 360360))));
  const double half_log_2pi = 0.91893853320467274178;
  return (x - 0.5) * __builtin_log(x) - x + half_log_2pi + series / x - __builtin_log(product);
}

// Both values are evaluated: a load that a condition guards would be vectorised into a masked load, and GCC 12 masks the
// second half of an unrolled double loop with the first half's condition (seen with AVX2; tests/ops/test_kd.py, masks).
template <class Real>
BKD_HD Real choose(bool condition, Real yes, Real no) {
  return condition ? yes : no;
}

// Independent partial results, so that a reduction is not one long chain of additions.
constexpr int kStripes = 8;

// sum_k f(k) for k in [0, n), in double: a float chain over a long row loses digits.
template <class F>
BKD_HD double sum_over(int64_t n, F f) {
  double part[kStripes] = {};
  const int64_t whole = n - n % kStripes;
  for (int64_t k = 0; k < whole; k += kStripes)
    for (int s = 0; s < kStripes; ++s) part[s] += (double)f(k + s);
  for (int64_t k = whole; k < n; ++k) part[0] += (double)f(k);
  double total = 0;
  for (int s = 0; s < kStripes; ++s) total += part[s];
  return total;
}

template <class F>
BKD_HD bool any_of(int64_t n, F f) {
  bool found = false;
  for (int64_t k = 0; k < n; ++k) found |= f(k);
  return found;
}

template <class Real>
BKD_HD Real largest(const Real* x, int64_t n) {
  Real top[kStripes];
  for (int s = 0; s < kStripes; ++s) top[s] = (Real)-kInfinity;
  const int64_t whole = n - n % kStripes;
  for (int64_t k = 0; k < whole; k += kStripes)
    for (int s = 0; s < kStripes; ++s) top[s] = x[k + s] > top[s] ? x[k + s] : top[s];
  for (int64_t k = whole; k < n; ++k) top[0] = x[k] > top[0] ? x[k] : top[0];
  for (int s = 1; s < kStripes; ++s) top[0] = top[s] > top[0] ? top[s] : top[0];
  return top[0];
}

template <class Real>
BKD_HD bool has_nan_or_positive_infinity(const Real* x, int64_t n) {
  return any_of(n, [=](int64_t k) { return !(x[k] < (Real)kInfinity); });
}

template <class Real>
BKD_HD bool is_distribution(const Real* p, int64_t n, double tolerance) {
  if (any_of(n, [=](int64_t k) { return !(p[k] >= 0); })) return false;
  const double excess = sum_over(n, [=](int64_t k) { return p[k]; }) - 1.0;
  return excess <= tolerance && excess >= -tolerance;
}

// Whether signed shares are finite and sum to 1, by as many roundings as they are larger than probabilities.
template <class Real>
BKD_HD bool sums_to_one(const Real* p, int64_t n, double tolerance) {
  const double size = sum_over(n, [=](int64_t k) { return p[k] < 0 ? -p[k] : p[k]; });
  const double excess = sum_over(n, [=](int64_t k) { return p[k]; }) - 1.0;
  const double allowed = tolerance * (size < 1 ? 1.0 : size);
  return size < kInfinity && excess <= allowed && excess >= -allowed;
}

// A softmax and its logarithm at temperature T from logits or, in their stead, log probabilities.
template <class Real>
BKD_HD void tempered_softmax(const Real* logits, int64_t n, double temperature, Real* p, Real* log_p) {
  const Real top = largest(logits, n), inverse = (Real)(1.0 / temperature);
  for (int64_t k = 0; k < n; ++k) log_p[k] = (logits[k] - top) * inverse;
  for (int64_t k = 0; k < n; ++k) p[k] = exp_nonpositive(log_p[k]);
  const double total = sum_over(n, [=](int64_t k) { return p[k]; });
  const Real share = (Real)(1.0 / total), log_total = (Real)__builtin_log(total);
  for (int64_t k = 0; k < n; ++k) p[k] *= share;
  for (int64_t k = 0; k < n; ++k) log_p[k] -= log_total;
}

// A top-k teacher's row written out: `rest` for every class but the `count` in `indices`, whose logits are `values`.
// Until its logit replaces it, a named class holds its number in the list: of one named twice only the last.
template <class Real, class Index>
BKD_HD Fault expand_top(const Real* values, const Index* indices, int64_t count, Real rest, int64_t classes, Real* row) {
  for (int64_t k = 0; k < classes; ++k) row[k] = rest;
  for (int64_t j = 0; j < count; ++j) {
    if ((uint64_t)(int64_t)indices[j] >= (uint64_t)classes) return Fault::teacher_index_out_of_range;
    row[indices[j]] = (Real)j;
  }
  for (int64_t j = 0; j < count; ++j) {
    if (row[indices[j]] != (Real)j) return Fault::teacher_index_repeated;
    row[indices[j]] = values[j];
  }
  return Fault::none;
}

// The teacher's row as p_T and log p_T. From probabilities p_T is proportional to p^(1/T), which is softmax(log p / T).
template <class Real>
BKD_HD Fault teacher_distribution(const KdSettings& s, const Real* teacher, Real* p, Real* log_p) {
  const int64_t n = s.classes;
  if (s.teacher_is_probs) {
    if (!is_distribution(teacher, n, s.sum_tolerance_teacher)) return Fault::teacher_not_probabilities;
    for (int64_t k = 0; k < n; ++k) p[k] = log_of(teacher[k]);
    tempered_softmax(p, n, s.temperature, p, log_p);
    return Fault::none;
  }
  if (has_nan_or_positive_infinity(teacher, n)) return Fault::teacher_not_finite;
  if (largest(teacher, n) == (Real)-kInfinity) return Fault::teacher_all_masked;
  tempered_softmax(teacher, n, s.temperature, p, log_p);
  return Fault::none;
}

// CE(p, q_T) = -sum_k p_k log q_k, where 0 log 0 = 0; p may be signed.
template <class Real>
BKD_HD double cross_entropy(const Real* p, const Real* log_q, int64_t n) {
  return -sum_over(n, [=](int64_t k) { return choose(p[k] != 0, p[k] * log_q[k], (Real)0); });
}

// Adds the mixture prior: energy -log sum_m w_m Dir(q_T; 1 + lambda p_m). `p` is (teachers, classes), their entropies in
// `entropy`; `score` and `entropy` are (teachers).
// Gradient: d(-log sum_m exp l_m) = -sum_m r_m dl_m with r = softmax(l), and dl_m = lambda d sum_k p_mk log q_k, so the row
// behaves like one Dirichlet prior whose teacher is the mean sum_m r_m p_m. That mean replaces the first row of p.
template <class Real>
BKD_HD Fault mixture_energy(const KdSettings& s, const Real* weights, const Real* log_q, Real* p, double* entropy,
                            double* score, double& energy) {
  const int64_t n = s.classes, teachers = s.teachers;
  if (weights && !is_distribution(weights, teachers, s.sum_tolerance_teacher)) return Fault::weights_not_probabilities;
  const double total_entropy = sum_over(teachers, [=](int64_t m) { return entropy[m]; });
  double total_weight = 0, top = -kInfinity;
  for (int64_t m = 0; m < teachers; ++m) {
    // w_m = 1 - H_m / sum H (methods.md section 1), which one teacher or entropies of 0 would leave undefined
    const bool even = teachers == 1 || total_entropy <= 0;
    const double weight = weights ? (double)weights[m] : even ? 1.0 : 1.0 - entropy[m] / total_entropy;
    total_weight += weight;
    const Real* row = p + m * n;
    const double strength = s.prior_strength;
    const double log_normaliser =
        log_gamma_1p(strength + (double)(n - 1)) - sum_over(n, [=](int64_t k) { return log_gamma_1p(strength * (double)row[k]); });
    score[m] = __builtin_log(weight) + log_normaliser - strength * cross_entropy(row, log_q, n);
    top = score[m] > top ? score[m] : top;
  }
  double total = 0;
  for (int64_t m = 0; m < teachers; ++m) total += score[m] = __builtin_exp(score[m] - top);
  energy += __builtin_log(total_weight) - top - __builtin_log(total);
  for (int64_t k = 0; k < n; ++k) p[k] *= (Real)(score[0] / total);
  for (int64_t m = 1; m < teachers; ++m) {
    const Real responsibility = (Real)(score[m] / total);
    for (int64_t k = 0; k < n; ++k) p[k] += responsibility * p[m * n + k];
  }
  return Fault::none;
}

// Adds the prior's energy and writes scale * its gradient with respect to z. Every gradient carries the factor lambda / T:
// lambda of the energy, 1 / T of the chain rule through z / T.
template <class Real>
BKD_HD Fault prior_energy(const KdSettings& s, const KdRow<Real>& row, const Real* q, const Real* log_q, Real* p, Real* log_p,
                          double* entropy, double& energy, Real* gradient) {
  const int64_t n = s.classes;
  for (int64_t m = 0; m < s.teachers; ++m) {
    const Fault fault = teacher_distribution(s, row.teacher + m * n, p + m * n, log_p + m * n);
    if (fault != Fault::none) return fault;
    entropy[m] = s.prior == Prior::mixture ? cross_entropy(p + m * n, log_p + m * n, n) : 0.0;
  }
  const Real factor = (Real)(s.scale * s.prior_strength / s.temperature);

  if (s.prior == Prior::dirichlet || s.prior == Prior::mixture) {
    const Real lowest = (Real)-kInfinity;
    for (int64_t m = 0; m < s.teachers; ++m)
      if (any_of(n, [=](int64_t k) { return (p[m * n + k] > 0) & (row.logits[k] == lowest); })) return Fault::teacher_on_masked_class;
    if (s.prior == Prior::mixture) {
      const Fault fault = mixture_energy(s, row.weights, log_q, p, entropy, entropy + s.teachers, energy);
      if (fault != Fault::none) return fault;
    } else {
      energy += s.prior_strength * cross_entropy(p, log_q, n);
    }
    // d CE(p, q_T) / dz_k = (sum_j p_j) q_k - p_k over T, and p sums to 1
    for (int64_t k = 0; k < n; ++k) gradient[k] = factor * (q[k] - p[k]);
    return Fault::none;
  }

  const Real lowest = (Real)-kInfinity;
  if (any_of(n, [=](int64_t k) { return (log_p[k] == lowest) & (row.logits[k] > lowest); })) return Fault::teacher_excludes_class;
  // Both energies are sum_k q_k a_k with a = -log p (continuous categorical) or log q - log p (reverse KL). Through a softmax
  // df/dz_k = q_k (f'_k - sum_j q_j f'_j); for the reverse KL f'_k = a_k + 1, and the 1 cancels.
  const bool reverse = s.prior == Prior::reverse_kl;
  for (int64_t k = 0; k < n; ++k) log_p[k] = choose(q[k] > 0, choose(reverse, log_q[k], (Real)0) - log_p[k], (Real)0);
  const double mean = sum_over(n, [=](int64_t k) { return q[k] * log_p[k]; });
  energy += s.prior_strength * mean;
  for (int64_t k = 0; k < n; ++k) gradient[k] = factor * q[k] * (log_p[k] - (Real)mean);
  return Fault::none;
}

// Adds label_weight CE(y', q) and its gradient scale * label_weight ((sum_j y'_j) q_k - y'_k).
template <class Real>
BKD_HD Fault label_energy(const KdSettings& s, const KdRow<Real>& row, const Real* q, const Real* log_q, double& energy,
                          Real* gradient) {
  const int64_t n = s.classes, label = row.label;
  const Real* soft = row.soft;
  const Real lowest = (Real)-kInfinity;
  double mass = 1, hit = 0;  // sum_k y_k and sum_k y_k log q_k of the unsmoothed label
  if (soft) {
    if (s.signed_target) {
      if (!sums_to_one(soft, n, s.sum_tolerance_target)) return Fault::target_sum_not_one;
    } else if (!is_distribution(soft, n, s.sum_tolerance_target)) {
      return Fault::target_not_probabilities;
    }
    if (any_of(n, [=](int64_t k) { return (soft[k] != 0) & (row.logits[k] == lowest); })) return Fault::target_on_masked_class;
    mass = sum_over(n, [=](int64_t k) { return soft[k]; });
    hit = -cross_entropy(soft, log_q, n);
  } else {
    if (row.logits[label] == lowest) return Fault::target_on_masked_class;
    hit = (double)log_q[label];
  }
  const double keep = 1 - s.label_smoothing, weight = s.label_weight;
  double spread = 0, even = 0;  // sum of the unmasked log q, and the smoothing's share of each of their classes
  if (s.label_smoothing > 0) {
    even = s.label_smoothing / sum_over(n, [=](int64_t k) { return row.logits[k] > lowest ? 1 : 0; });
    spread = sum_over(n, [=](int64_t k) { return choose(row.logits[k] > lowest, log_q[k], (Real)0); });
  }
  energy -= weight * (keep * hit + even * spread);

  const double scale = s.scale * weight;
  const Real total = (Real)(scale * (keep * mass + s.label_smoothing)), share = (Real)(scale * even), peak = (Real)(scale * keep);
  for (int64_t k = 0; k < n; ++k) gradient[k] += q[k] * total - choose(row.logits[k] > lowest, share, (Real)0);
  if (soft) {
    for (int64_t k = 0; k < n; ++k) gradient[k] -= peak * soft[k];
  } else {
    gradient[label] -= peak;
  }
  return Fault::none;
}

// Elements of Real that kd_row needs as scratch.
BKD_HD int64_t kd_scratch(const KdSettings& s) { return (4 + 2 * s.teachers) * s.classes; }

// The row's energy and scale * d energy / dz. `sums` holds 2 * teachers doubles. On a fault nothing written means anything.
template <class Real>
BKD_HD Fault kd_row(const KdSettings& s, const KdRow<Real>& row, Real* scratch, double* sums, double& energy, Real* gradient) {
  const int64_t n = s.classes;
  Real* q = scratch;
  Real* log_q = q + n;
  Real* q_T = log_q + n;
  Real* log_q_T = q_T + n;
  Real* p = log_q_T + n;
  Real* log_p = p + s.teachers * n;

  if (has_nan_or_positive_infinity(row.logits, n)) return Fault::logits_not_finite;
  if (largest(row.logits, n) == (Real)-kInfinity) return Fault::logits_all_masked;
  energy = 0;
  for (int64_t k = 0; k < n; ++k) gradient[k] = 0;
  if (s.prior != Prior::none) {
    tempered_softmax(row.logits, n, s.temperature, q_T, log_q_T);
    const Fault fault = prior_energy(s, row, q_T, log_q_T, p, log_p, sums, energy, gradient);
    if (fault != Fault::none) return fault;
  }
  if (row.soft || row.label >= 0) {
    tempered_softmax(row.logits, n, 1.0, q, log_q);
    return label_energy(s, row, q, log_q, energy, gradient);
  }
  return Fault::none;
}

}  // namespace bkd
