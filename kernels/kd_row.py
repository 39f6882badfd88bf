"""One row of the KD energy in Triton: its elements, its sums, its energy and gradient, as every kernel of it computes them.

The mathematics is csrc/kd.h's. With x = z - max z, u = exp(x / T), w = exp(x) and v the teacher's exp((t - max t) / T)::

    prior                   energy                                            gradient
    dirichlet               lambda (log sum u - sum v x / (T sum v))          lambda / T (u / sum u - v / sum v)
    continuous_categorical  lambda (sum u a / sum u + log sum v), a = -log v  lambda / T u / sum u (a - sum u a / sum u)
    reverse_kl              the same with a = log u - log v, less lambda log sum u
    label                   weight (log sum w - x_y)                          weight (w / sum w - y)

so one set of sums, `Sums`, serves them all; the mixture is a Dirichlet prior of the teachers' mean (kd.py). Exponents are in
base 2. A logit of -inf masks its class. Settings that a kernel does not have (constexpr arguments) leave no instruction behind.

A row whose numbers cannot be used (bkd_fast/ops/faults.py) comes out with an energy that is not finite, at no cost per element:
every input is in some sum, and what is not finite in it stays so. kd_settle.py finds the reason.
"""

import struct
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from bkd_fast.kernels.half import narrow

PRIORS = {"none": 0, "dirichlet": 1, "continuous_categorical": 2, "reverse_kl": 3, "mixture": 4}
NONE: tl.constexpr = tl.constexpr(0)
DIRICHLET: tl.constexpr = tl.constexpr(1)
CONTINUOUS_CATEGORICAL: tl.constexpr = tl.constexpr(2)
REVERSE_KL: tl.constexpr = tl.constexpr(3)
MIXTURE: tl.constexpr = tl.constexpr(4)
ENTROPY: tl.constexpr = tl.constexpr(5)  # the reverse KL's own terms, as tiles without the teacher's have them

HARD: tl.constexpr = tl.constexpr(1)  # labels: 0 is none
SOFT: tl.constexpr = tl.constexpr(2)
SIGNED: tl.constexpr = tl.constexpr(3)  # soft, and maybe negative

INFINITY: tl.constexpr = tl.constexpr(float("inf"))
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


class Settings(NamedTuple):
    """The numbers that all rows share."""

    strength: tl.tensor  # lambda
    inverse_temperature: tl.tensor  # 1 / T
    label_weight: tl.tensor
    smoothing: tl.tensor
    scale: tl.tensor  # factor of the gradient
    tolerance_teacher: tl.tensor  # how far from 1 a row of probabilities may sum
    tolerance_target: tl.tensor


class Sums(NamedTuple):
    """What a row's columns add up to, (rows, columns) before and (rows, 1) after the reduction. What is not asked for stays 0."""

    student: tl.tensor  # u
    plain: tl.tensor  # w, where it is not u
    teacher: tl.tensor  # v
    cross: tl.tensor  # v x
    slope: tl.tensor  # u a, or for the mixture v log2 v
    given: tl.tensor  # the teacher's probabilities, as they were given
    soft: tl.tensor  # y
    least: tl.tensor  # min(y, 0), or where y may be negative the sum of |y|
    hit: tl.tensor  # y x
    spread: tl.tensor  # x of the unmasked classes
    unmasked: tl.tensor  # their number


class Coefficients(NamedTuple):
    """A row's gradient as a function of its elements, (rows, 1) each."""

    student: tl.tensor  # of u, or of u (a - mean)
    plain: tl.tensor  # of w
    teacher: tl.tensor  # of v
    mean: tl.tensor  # sum u a / sum u
    even: tl.tensor  # off every unmasked class: the smoothing's share
    peak: tl.tensor  # off the label, or of y


@triton.jit
def real_of(x, REAL: tl.constexpr):
    """A setting: the number, or for float64 its bits as an integer (Triton passes floats as float32)."""
    if REAL == tl.float64:
        return x.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return x


@triton.jit
def settings_of(strength, inverse_temperature, label_weight, smoothing, scale, tolerance_teacher, tolerance_target,
                REAL: tl.constexpr):  # fmt: skip
    """A kernel's arguments as Settings."""
    return Settings(real_of(strength, REAL), real_of(inverse_temperature, REAL), real_of(label_weight, REAL),
                    real_of(smoothing, REAL), real_of(scale, REAL), real_of(tolerance_teacher, REAL),
                    real_of(tolerance_target, REAL))  # fmt: skip


@triton.jit
def lowest(REAL: tl.constexpr):
    """What a maximum starts from, so that subtracting it from -inf stays -inf."""
    if REAL == tl.float64:
        return -1.7976931348623157e308
    else:
        return -3.4028234663852886e38


@triton.jit
def nan_unless(good):
    """0, or NaN where a row is not good."""
    return tl.where(good, 0.0, float("nan"))


@triton.jit
def any_of(condition):
    return tl.max(condition.to(tl.int32), axis=None) != 0


# ---- elements ----


@triton.jit
def log_teacher(t, REAL: tl.constexpr, PROBS: tl.constexpr):
    """Teacher logits in REAL, or the base-2 logarithms of probabilities, which take their place."""
    t = t.to(REAL)
    if PROBS:
        t = tl.log2(t)
    return t


@triton.jit
def teacher_exponent(s, PROBS: tl.constexpr):
    """log2 v per unit of what _log_teacher gives."""
    if PROBS:
        return s.inverse_temperature
    else:
        return s.inverse_temperature * LOG2E


@triton.jit
def _plain(x, u, POWER: tl.constexpr):
    """w = exp(x): u^T for T = 1, 2 and 4, and only otherwise an exponential of its own."""
    if POWER == 1:
        return u
    elif POWER == 2:
        return u * u
    elif POWER == 4:
        return u * u * (u * u)
    else:
        return tl.exp2(x * LOG2E)


@triton.constexpr_function
def expects(prior):
    """Whether the energy is the teacher's expectation of -log q."""
    return prior in (DIRICHLET.value, MIXTURE.value)


@triton.constexpr_function
def streamed(prior, top):
    """What the tiles of a row have of a prior: nothing of a top-k teacher, which kd_topk.py adds."""
    if not top:
        return prior
    return ENTROPY.value if prior == REVERSE_KL.value else NONE.value


@triton.constexpr_function
def has_tiles(prior):
    """Whether a row's tiles have the teacher's."""
    return prior not in (NONE.value, ENTROPY.value)


@triton.constexpr_function
def _merged(prior, power):
    """Whether w is u and one coefficient serves both."""
    return power == 1 and prior not in (CONTINUOUS_CATEGORICAL.value, REVERSE_KL.value)


@triton.jit
def _slope(log_u, log_v, PRIOR: tl.constexpr):
    """a, in base 2."""
    if PRIOR == REVERSE_KL:
        return log_u - log_v
    else:
        return -log_v


@triton.jit
def add_tile(sums, z, t, p, y, z_top, t_top, s, PRIOR: tl.constexpr, PROBS: tl.constexpr, POWER: tl.constexpr,
         LABELS: tl.constexpr, SMOOTHED: tl.constexpr):  # fmt: skip
    """The sums with a tile of columns added."""
    x = z - z_top
    log_u = x * (s.inverse_temperature * LOG2E)
    u = tl.exp2(log_u)
    student = sums.student + u
    plain, teacher, cross, slope, given = sums.plain, sums.teacher, sums.cross, sums.slope, sums.given
    soft, least, hit, spread, unmasked = sums.soft, sums.least, sums.hit, sums.spread, sums.unmasked
    if LABELS and POWER != 1:
        plain += _plain(x, u, POWER)
    if PRIOR == ENTROPY:
        slope += tl.where(x == -INFINITY, 0.0, u * log_u)
    if has_tiles(PRIOR):
        log_v = (t - t_top) * teacher_exponent(s, PROBS)
        v = tl.exp2(log_v)
        teacher += v
        if expects(PRIOR):
            # 0 log 0 = 0; a class that the teacher expects and the mask forbids leaves -inf
            cross += tl.where(v != 0, v * x, 0.0)
        if PRIOR == MIXTURE:
            slope += tl.where(v != 0, v * log_v, 0.0)
        elif PRIOR != DIRICHLET:
            # u = 0 by underflow still asks for a finite a: 0 times infinity shows
            slope += tl.where(x == -INFINITY, 0.0, u * _slope(log_u, log_v, PRIOR))
        if PROBS:
            given += p
    if LABELS >= SOFT:
        soft += y
        if LABELS == SIGNED:
            least += tl.abs(y)
        else:
            least = tl.minimum(least, y)
        hit += tl.where(y != 0, y * x, 0.0)
    if SMOOTHED:
        here = x > -INFINITY
        spread += tl.where(here, x, 0.0)
        unmasked += tl.where(here, 1.0, 0.0)
    return Sums(student, plain, teacher, cross, slope, given, soft, least, hit, spread, unmasked)


@triton.jit
def gradient_tile(c, z, t, y, column, label, z_top, t_top, s, PRIOR: tl.constexpr, PROBS: tl.constexpr,
              POWER: tl.constexpr, LABELS: tl.constexpr, SMOOTHED: tl.constexpr):  # fmt: skip
    """scale * d energy / dz of a tile of columns."""
    x = z - z_top
    log_u = x * (s.inverse_temperature * LOG2E)
    u = tl.exp2(log_u)
    g = u * c.student
    if PRIOR == DIRICHLET:
        g -= tl.exp2((t - t_top) * teacher_exponent(s, PROBS)) * c.teacher
    elif PRIOR != NONE and PRIOR != MIXTURE:
        a = _slope(log_u, (t - t_top) * teacher_exponent(s, PROBS), PRIOR)
        g = tl.where(x == -INFINITY, 0.0, g * (a - c.mean))
    if LABELS:
        if not _merged(PRIOR, POWER):
            g += _plain(x, u, POWER) * c.plain
        if SMOOTHED:
            g -= tl.where(x > -INFINITY, c.even, 0.0)
        if LABELS >= SOFT:
            g -= y * c.peak
        else:
            g = tl.where(column == label, g - c.peak, g)
    return g


# ---- rows ----


@triton.jit
def zero_sums(ROWS: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr):
    zero = tl.zeros((ROWS, BLOCK), REAL)
    return Sums(zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def total_of(sums, PRIOR: tl.constexpr, PROBS: tl.constexpr, POWER: tl.constexpr, LABELS: tl.constexpr,
           SMOOTHED: tl.constexpr):  # fmt: skip
    """The sums over the columns."""
    student = tl.sum(sums.student, 1, keep_dims=True)
    zero = student * 0.0
    plain = student
    teacher, cross, slope, given = zero, zero, zero, zero
    soft, least, hit, spread, unmasked = zero, zero, zero, zero, zero
    if LABELS and POWER != 1:
        plain = tl.sum(sums.plain, 1, keep_dims=True)
    if has_tiles(PRIOR):
        teacher = tl.sum(sums.teacher, 1, keep_dims=True)
    if expects(PRIOR):
        cross = tl.sum(sums.cross, 1, keep_dims=True)
    if PRIOR != NONE and PRIOR != DIRICHLET:
        slope = tl.sum(sums.slope, 1, keep_dims=True)
    if PROBS:
        given = tl.sum(sums.given, 1, keep_dims=True)
    if LABELS >= SOFT:
        soft = tl.sum(sums.soft, 1, keep_dims=True)
        if LABELS == SIGNED:
            least = tl.sum(sums.least, 1, keep_dims=True)
        else:
            least = tl.min(sums.least, 1, keep_dims=True)
        hit = tl.sum(sums.hit, 1, keep_dims=True)
    if SMOOTHED:
        spread = tl.sum(sums.spread, 1, keep_dims=True)
        unmasked = tl.sum(sums.unmasked, 1, keep_dims=True)
    return Sums(student, plain, teacher, cross, slope, given, soft, least, hit, spread, unmasked)


@triton.jit
def _prior(total, s, PRIOR: tl.constexpr, PROBS: tl.constexpr):
    """The prior's energy, and its coefficients of u, of v, and the mean slope. Not for the mixture."""
    zero = total.student * 0.0  # NaN where the logits are: an energy without terms shows them too
    energy, student, teacher, mean = zero, zero, zero, zero
    if PRIOR != NONE:
        factor = s.scale * s.strength * s.inverse_temperature
        student = factor / total.student
        if PRIOR == DIRICHLET:
            teacher = factor / total.teacher
            energy = s.strength * (tl.log(total.student) - total.cross * s.inverse_temperature / total.teacher)
        else:
            mean = total.slope / total.student
            energy = mean * LN2 + tl.log(total.teacher)
            if PRIOR == REVERSE_KL:
                energy -= tl.log(total.student)
            energy *= s.strength
            student *= LN2
        if PROBS:
            energy += nan_unless(tl.abs(total.given - 1.0) <= s.tolerance_teacher)
    else:
        energy += tl.log(total.student) * 0.0
    return energy, student, teacher, mean


@triton.jit
def _label(total, label, x_label, s, LABELS: tl.constexpr, SMOOTHED: tl.constexpr):
    """The label's energy weight (mass log sum w - keep hit - even spread), and its coefficients of w, even and peak."""
    weight = s.label_weight + total.student * 0.0
    mass, hit = 1.0, x_label
    if LABELS >= SOFT:
        mass, hit = total.soft, total.hit
    else:
        weight = tl.where(label >= 0, weight, 0.0)  # a factor, not a choice: bad logits show in unlabelled rows too
    keep = 1.0 - s.smoothing
    even = total.student * 0.0
    inner = (keep * mass + s.smoothing) * tl.log(total.plain) - keep * hit
    if SMOOTHED:
        even += s.smoothing / total.unmasked
        inner -= even * total.spread
    energy = weight * inner
    if LABELS >= SOFT:
        excess = tl.abs(total.soft - 1.0)
        if LABELS == SIGNED:
            good = excess <= s.tolerance_target * tl.maximum(total.least, 1.0)
        else:
            good = (excess <= s.tolerance_target) & (total.least >= 0)
        energy += nan_unless(good)
    weight *= s.scale
    return energy, weight * (keep * mass + s.smoothing) / total.plain, weight * even, weight * keep


@triton.jit
def finish_rows(total, label, x_label, out_of_range, s, PRIOR: tl.constexpr, PROBS: tl.constexpr, POWER: tl.constexpr,
            LABELS: tl.constexpr, SMOOTHED: tl.constexpr, BY_LABEL: tl.constexpr):  # fmt: skip
    """The energy of rows and the coefficients of their gradient."""
    energy, student, teacher, mean = _prior(total, s, PRIOR, PROBS)
    if BY_LABEL:
        energy = tl.where(label >= 0, energy, tl.log(total.student) * 0.0)  # whatever the row was that it read in vain
    zero = total.student * 0.0
    plain, even, peak = zero, zero, zero
    if LABELS:
        label_energy, plain, even, peak = _label(total, label, x_label, s, LABELS, SMOOTHED)
        energy += label_energy
        energy = tl.where(out_of_range, float("nan"), energy)
        if _merged(PRIOR, POWER):
            student += plain
    return energy, Coefficients(student, plain, teacher, mean, even, peak)


@triton.jit
def teacher_row(labels, row, inside, CLASSES: tl.constexpr, BY_LABEL: tl.constexpr):
    """Which of the teacher's rows is a row's: its own, or BY_LABEL that of its label, of the nearest class where that is none."""
    if BY_LABEL:
        label = tl.load(labels + row, mask=inside, other=0)
        return tl.minimum(tl.maximum(label, 0), CLASSES - 1)
    else:
        return row


@triton.jit
def read_labels(labels, row, inside, ignore_index, label_weight, CLASSES: tl.constexpr, BY_LABEL: tl.constexpr):
    """The label of each row, -1 for none, and whether it is neither a class nor to be ignored. BY_LABEL it is the teacher's too,
    whatever it weighs."""
    label = tl.load(labels + row, mask=inside, other=0)
    is_class = (label >= 0) & (label < CLASSES)
    ignored = label == ignore_index
    used = tl.where(is_class & (label != ignore_index), label, -1)
    if not BY_LABEL:
        used = tl.where(label_weight != 0.0, used, -1)
    return used.to(tl.int32), inside & ((is_class | ignored) == 0)


@triton.jit
def top_of_labelled(z_top, label):
    """What a row's gradient subtracts from its logits where the teacher is by label: of a row without one, infinity, which makes
    every class as if masked, and the gradient 0."""
    return tl.where(label >= 0, z_top, INFINITY)


@triton.jit
def load_tile(base, column, inside, filler, CLASSES: tl.constexpr, FULL: tl.constexpr, ONE: tl.constexpr):
    """A tile of columns; `filler` beyond the last class (never, where FULL) and in rows that are not there (never, where ONE)."""
    if FULL and ONE:
        return tl.load(base + column)
    elif FULL:
        return tl.load(base + column, mask=inside, other=filler)
    else:
        return tl.load(base + column, mask=inside & (column < CLASSES), other=filler)


@triton.jit
def store_tile(base, column, inside, value, CLASSES: tl.constexpr, FULL: tl.constexpr, ONE: tl.constexpr):
    value = narrow(value, base.dtype.element_ty)
    if FULL and ONE:
        tl.store(base + column, value)
    elif FULL:
        tl.store(base + column, value, mask=inside)
    else:
        tl.store(base + column, value, mask=inside & (column < CLASSES))


@triton.jit
def read_tiles(z_base, t_base, y_base, column, inside, REAL: tl.constexpr, CLASSES: tl.constexpr, FULL: tl.constexpr,
          ONE: tl.constexpr, PRIOR: tl.constexpr, PROBS: tl.constexpr, LABELS: tl.constexpr):  # fmt: skip
    """A tile of student logits, of the teacher's row and of soft labels, as they are stored; z for what there is not."""
    z = load_tile(z_base, column, inside, -INFINITY, CLASSES, FULL, ONE)
    t, y = z, z
    if has_tiles(PRIOR):
        t = load_tile(t_base, column, inside, 0.0 if PROBS else -INFINITY, CLASSES, FULL, ONE)
    if LABELS >= SOFT:
        y = load_tile(y_base, column, inside, 0.0, CLASSES, FULL, ONE)
    return z, t, y


@triton.jit
def _shifted(
    sums, dz, log_dv, s, PRIOR: tl.constexpr, POWER: tl.constexpr, LABELS: tl.constexpr, SMOOTHED: tl.constexpr
):
    """The sums where the maxima have risen: x and log2 v of every column fall by -dz and -log_dv."""
    log_du = dz * (s.inverse_temperature * LOG2E)
    du = tl.exp2(log_du)
    student = sums.student * du
    plain, teacher, cross, slope, hit, spread = sums.plain, sums.teacher, sums.cross, sums.slope, sums.hit, sums.spread
    if LABELS and POWER != 1:
        plain *= _plain(dz, du, POWER)
    if PRIOR == ENTROPY:
        slope = (slope + log_du * sums.student) * du
    if has_tiles(PRIOR):
        dv = tl.exp2(log_dv)
        teacher *= dv
        if expects(PRIOR):
            cross = (cross + dz * sums.teacher) * dv
        if PRIOR == MIXTURE:
            slope = (slope + log_dv * sums.teacher) * dv
        elif PRIOR != DIRICHLET:
            slope = (slope + _slope(log_du, log_dv, PRIOR) * sums.student) * du
    if LABELS >= SOFT:
        hit += dz * sums.soft
    if SMOOTHED:
        spread += dz * sums.unmasked
    return Sums(student, plain, teacher, cross, slope, sums.given, sums.soft, sums.least, hit, spread, sums.unmasked)


@triton.jit
def _extend(sums, z_top, t_top, z_base, t_base, y_base, column, s, REAL: tl.constexpr, CLASSES: tl.constexpr,
            FULL: tl.constexpr, PRIOR: tl.constexpr, PROBS: tl.constexpr, POWER: tl.constexpr, LABELS: tl.constexpr,
            SMOOTHED: tl.constexpr):  # fmt: skip
    """The sums and maxima with one more tile of a row, (1, columns)."""
    z, p, y = read_tiles(z_base, t_base, y_base, column, column >= 0, REAL, CLASSES, FULL, True, PRIOR, PROBS, LABELS)
    z, t = z.to(REAL), log_teacher(p, REAL, PROBS)
    z_new = tl.maximum(z_top, tl.max(z, 1, keep_dims=True))
    dz = tl.where(z_top == lowest(REAL), 0.0, z_top - z_new)  # nothing was added yet
    t_new, log_dv = t_top, dz
    if has_tiles(PRIOR):
        t_new = tl.maximum(t_top, tl.max(t, 1, keep_dims=True))
        log_dv = tl.where(t_top == lowest(REAL), 0.0, t_top - t_new) * teacher_exponent(s, PROBS)
    sums = _shifted(sums, dz, log_dv, s, PRIOR, POWER, LABELS, SMOOTHED)
    sums = add_tile(sums, z, t, p.to(REAL), y.to(REAL), z_new, t_new, s, PRIOR, PROBS, POWER, LABELS, SMOOTHED)
    return sums, z_new, t_new


@triton.jit
def sums_of_row(z_base, t_base, y_base, s, REAL: tl.constexpr, CLASSES: tl.constexpr, PRIOR: tl.constexpr,
              PROBS: tl.constexpr, POWER: tl.constexpr, LABELS: tl.constexpr, SMOOTHED: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """One row's sums and maxima, (1, 1) each, from one read. A column's chain of additions is CLASSES / BLOCK long."""
    lane = tl.arange(0, BLOCK)[None, :]
    whole: tl.constexpr = CLASSES // BLOCK * BLOCK
    z_top = tl.full((1, 1), lowest(REAL), REAL)
    t_top = z_top
    sums = zero_sums(1, BLOCK, REAL)
    for start in range(0, whole, BLOCK):
        sums, z_top, t_top = _extend(sums, z_top, t_top, z_base, t_base, y_base, start + lane, s, REAL, CLASSES, True, PRIOR,
                                     PROBS, POWER, LABELS, SMOOTHED)  # fmt: skip
    if whole < CLASSES:
        sums, z_top, t_top = _extend(sums, z_top, t_top, z_base, t_base, y_base, whole + lane, s, REAL, CLASSES, False, PRIOR,
                                     PROBS, POWER, LABELS, SMOOTHED)  # fmt: skip
    return total_of(sums, PRIOR, PROBS, POWER, LABELS, SMOOTHED), z_top, t_top


# ---- on the host ----


def kind_of_labels(labels: Tensor | None, soft: Tensor | None, signed: bool) -> int:
    """LABELS of a launch."""
    kind = HARD if labels is not None else SIGNED if signed else SOFT
    return 0 if labels is None and soft is None else int(kind.value)


def number_of(value: float, double: bool) -> float | int:
    """A setting as `real_of` expects it."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0]) if double else float(value)
