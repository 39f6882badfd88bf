// The posterior predictive's arithmetic: softmax statistics of a row, and what one draw of a cell adds to code, moments and
// divergence. The operations and their order are fixed, so that every backend makes the same bits of the same logits: sums
// over the classes of a short row run in order, those of a long row in sixteen lanes (class c in lane c mod 16) and then by
// one tree (lanes i and i + 8, i + 4, i + 2, i + 1).
#pragma once
#include "explog.h"

namespace bkd {

constexpr int kSumLanes = 16;
constexpr int kShortRow = 32;  // classes
constexpr float kSmallestReference = 0x1p-126f;

// KL(p || r) is the sum over classes of r ((1 + x) log(1 + x) - x), x = p / r - 1 (the linear terms add to 0, and cancel
// in the difference of two divergences whatever r is). Near x = 0 that is x^2 times this polynomial, relative error
// 3.3e-7; the plain form would lose x^2 to cancellation.
constexpr float kSeriesRadius = 0.25f;
constexpr float kSeries[6] = {0.5000001f,   -0.16666678f,  0.083291784f,
                              -0.049967587f, 0.03508401f, -0.02517435f};

#ifdef BKD_ISA
namespace BKD_ISA {
#endif

// Of a row: its maximum, and over its classes the sums of exponentials without the arg-max classes, of exponential times
// exponent, and the number of arg-max classes.
struct RowSums {
  Floats maximum, rest, weighted, ties;
};

BKD_HD void add_class(Floats logit, Floats maximum, Floats& rest, Floats& weighted, Floats& ties) {
  const Floats difference = sub(logit, maximum);
  const Exponential e = exp_nonpositive(difference);
  const Mask top = equal(difference, set1(0.0f));
  rest = add(rest, select(top, set1(0.0f), e.value));
  weighted = fma(e.value, e.argument, weighted);
  ties = add(ties, select(top, set1(1.0f), set1(0.0f)));
}

struct RowStatistics {
  Floats maximum, total, rest, inverse_total, log_total, entropy;
  Mask valid;
};

// A row is invalid if it holds NaN or +inf, or nothing but -inf: its differences, and so the weighted sum, are then NaN.
// (The sum of exponentials would not do: the exponential's bit arithmetic may lose a NaN that has a payload.)
BKD_HD RowStatistics statistics_of(const RowSums& sums) {
  const Floats one = set1(1.0f);
  const Floats total = add(sums.rest, sums.ties), inverse = div(one, total), rest = add(sums.rest, sub(sums.ties, one));
  // log(1 + rest) with what the sum lost: entropies of confident rows are far below the sum's rounding
  const Floats lost = sub(rest, sub(total, one)), log_total = fma(lost, inverse, log_positive(total));
  return {sums.maximum, total, rest, inverse, log_total, fnma(sums.weighted, inverse, log_total),
          equal(sums.weighted, sums.weighted)};
}

// A cell in one draw: its logit from the row's maximum on, the exponentials of the other classes, p and log p.
struct CellDraw {
  Floats difference, others, probability, log_probability;
};

BKD_HD CellDraw draw_of(Floats logit, Floats maximum, Floats total, Floats rest, Floats inverse_total, Floats log_total) {
  const Floats difference = sub(logit, maximum);
  const Exponential e = exp_nonpositive(difference);
  // the others' sum is never taken as total - 1, which would cancel
  const Floats others = select(equal(difference, set1(0.0f)), rest, sub(total, e.value));
  return {difference, others, mul(e.value, inverse_total), sub(e.argument, log_total)};
}

// logit(p) = z - logsumexp of the other classes
BKD_HD Floats logit_of(Floats difference, Floats others) { return sub(difference, log_positive(others)); }
BKD_HD Floats logit_of(const CellDraw& draw) { return logit_of(draw.difference, draw.others); }

// One class of KL(p || reference), divided by the reference.
BKD_HD Floats divergence_term(Floats probability, Floats log_probability, Floats reference, Floats inverse_reference,
                              Floats log_reference) {
  const Floats x = mul(sub(probability, reference), inverse_reference), square = mul(x, x);
  const Floats even = fma(fma(set1(kSeries[4]), square, set1(kSeries[2])), square, set1(kSeries[0]));
  const Floats odd = fma(fma(set1(kSeries[5]), square, set1(kSeries[3])), square, set1(kSeries[1]));
  const Floats series = fma(odd, x, even);
  const Floats log_ratio = sub(log_probability, log_reference);
  const Floats plain = sub(fma(x, log_ratio, log_ratio), x);
  return select(less(square, set1(kSeriesRadius * kSeriesRadius)), mul(square, series), plain);
}

#ifdef BKD_ISA
}  // namespace BKD_ISA
#endif
}  // namespace bkd
