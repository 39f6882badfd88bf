"""What a top-k teacher adds to a row of the KD energy in Triton, which is read without one: k classes are gathered, the others
share a logit.

Of a row's sums (kd_row.py) three know the teacher. With v and x of the k named classes, v' of any other, and sums over all
classes without a letter below::

    sum v          (C - k) v' + sum_k v
    sum v x        v' (sum x - sum_k x) + sum_k v x
    sum u log v    log v' (sum u - sum_k u) + sum_k u log v

No term cancels another, as v >= v' and x <= 0. The gradient is stored as if every class were one of the others, and, when all of
a row is, once more at the k.
"""

import triton
import triton.language as tl

from bkd_fast.kernels.half import narrow
from bkd_fast.kernels.kd_row import (
    DIRICHLET,
    INFINITY,
    LOG2E,
    SOFT,
    Sums,
    any_of,
    expects,
    gradient_tile,
    lowest,
)


@triton.jit
def read_rest(rest, row, inside, REAL: tl.constexpr, CLASSES: tl.constexpr, TOP: tl.constexpr):
    """The logit of each row's other classes; -inf where there are none."""
    if TOP == CLASSES:
        return tl.full(row.shape, -INFINITY, REAL)
    else:
        return tl.load(rest + row, mask=inside, other=0.0).to(REAL)


@triton.jit
def _read_named(z_base, t_base, i_base, y_base, slot, inside, REAL: tl.constexpr, CLASSES: tl.constexpr, TOP: tl.constexpr,
                LABELS: tl.constexpr):  # fmt: skip
    """A tile of named classes: their columns, whether they are there, and z, t and y of each; t is NaN where it is no class."""
    here = inside & (slot < TOP)
    column = tl.load(i_base + slot, mask=here, other=0)
    is_class = (column >= 0) & (column < CLASSES)
    t = tl.load(t_base + slot, mask=here, other=-INFINITY).to(REAL)
    t = tl.where(is_class, t, float("nan"))
    here = here & is_class
    z = tl.load(z_base + column, mask=here, other=-INFINITY).to(REAL)
    y = z
    if LABELS >= SOFT:
        y = tl.load(y_base + column, mask=here, other=0.0).to(REAL)
    return column, here, z, t, y


@triton.jit
def top_of_teacher(t_base, t_rest, inside, REAL: tl.constexpr, TOP: tl.constexpr, WIDTH: tl.constexpr):
    """The largest logit of each row."""
    slot = tl.arange(0, WIDTH)[None, :]
    top = tl.maximum(t_rest, lowest(REAL))
    for start in range(0, TOP, WIDTH):
        t = tl.load(t_base + start + slot, mask=inside & (start + slot < TOP), other=-INFINITY).to(REAL)
        top = tl.maximum(top, tl.max(t, 1, keep_dims=True))
    return top


@triton.jit
def add_teacher(total, z_base, t_base, i_base, t_rest, inside, z_top, t_top, s, REAL: tl.constexpr, CLASSES: tl.constexpr,
                PRIOR: tl.constexpr, TOP: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The sums of rows whose tiles were read without their teacher, with it."""
    slot = tl.arange(0, WIDTH)[None, :]
    exponent = s.inverse_temperature * LOG2E
    zero = total.student * 0.0
    teacher, cross, slope, student, spread, unmasked = zero, zero, zero, zero, zero, zero
    for start in range(0, TOP, WIDTH):
        _column, _here, z, t, _y = _read_named(
            z_base, t_base, i_base, z_base, start + slot, inside, REAL, CLASSES, TOP, 0
        )
        x = z - z_top
        log_v = (t - t_top) * exponent
        v = tl.exp2(log_v)
        live = x > -INFINITY
        teacher += tl.sum(v, 1, keep_dims=True)
        unmasked += tl.sum(tl.where(live, 1.0, 0.0), 1, keep_dims=True)
        if PRIOR == DIRICHLET:
            cross += tl.sum(tl.where(v != 0, v * x, 0.0), 1, keep_dims=True)
            spread += tl.sum(tl.where(live, x, 0.0), 1, keep_dims=True)
        else:
            u = tl.exp2(x * exponent)
            student += tl.sum(u, 1, keep_dims=True)
            slope += tl.sum(tl.where(live, u * log_v, 0.0), 1, keep_dims=True)
    log_v = (t_rest - t_top) * exponent
    v = tl.exp2(log_v)
    others = total.unmasked - unmasked  # that are not masked
    teacher += v * (CLASSES - TOP)
    if PRIOR == DIRICHLET:
        far = tl.where(others == CLASSES - TOP, v * (total.spread - spread), -INFINITY)
        cross += tl.where(v != 0, far, 0.0)
    else:
        slope = total.slope - slope - tl.where(others > 0, (total.student - student) * log_v, 0.0)
    return Sums(total.student, total.plain, teacher, cross, slope, total.given, total.soft, total.least, total.hit,
                total.spread, total.unmasked)  # fmt: skip


@triton.jit
def store_named(g_base, z_base, t_base, i_base, y_base, inside, label, z_top, t_top, c, s, REAL: tl.constexpr,
                CLASSES: tl.constexpr, PRIOR: tl.constexpr, POWER: tl.constexpr, LABELS: tl.constexpr, SMOOTHED: tl.constexpr,
                TOP: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The gradient of the named classes, over what other threads have stored there."""
    tl.debug_barrier()
    slot = tl.arange(0, WIDTH)[None, :]
    for start in range(0, TOP, WIDTH):
        column, here, z, t, y = _read_named(
            z_base, t_base, i_base, y_base, start + slot, inside, REAL, CLASSES, TOP, LABELS
        )
        g = gradient_tile(c, z, t, y, column, label, z_top, t_top, s, PRIOR, False, POWER, LABELS, SMOOTHED)
        tl.store(g_base + column, narrow(g, g_base.dtype.element_ty), mask=here)


@triton.jit
def faults_of_top(z_base, t_base, i_base, t_rest, masked, s, REAL: tl.constexpr, CLASSES: tl.constexpr, PRIOR: tl.constexpr,
                  TOP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One bit for each fault of the teacher of one row, `masked` of whose classes are; classes that are repeated go unnoticed."""
    lane = tl.arange(0, BLOCK)
    found = tl.full((), 0, tl.int32)
    if TOP < CLASSES:
        found = tl.where(t_rest < INFINITY, 0, 1 << 3)
    top = t_rest
    for start in range(0, TOP, BLOCK):
        here = start + lane < TOP
        column = tl.load(i_base + start + lane, mask=here, other=0)
        found = found | tl.where(any_of((column < 0) | (column >= CLASSES)), 1 << 12, 0)
        t = tl.load(t_base + start + lane, mask=here, other=-INFINITY).to(REAL)
        found = found | tl.where(any_of((t < INFINITY) == 0), 1 << 3, 0)
        top = tl.maximum(top, tl.max(t))
    found = found | tl.where(top > -INFINITY, 0, 1 << 4)
    top = tl.maximum(top, lowest(REAL))
    exponent = s.inverse_temperature * LOG2E
    masked_here = tl.full((), 0, tl.int32)
    for start in range(0, TOP, BLOCK):
        _column, here, z, t, _y = _read_named(
            z_base, t_base, i_base, z_base, start + lane, lane >= 0, REAL, CLASSES, TOP, 0
        )
        log_v = (t - top) * exponent
        forbidden = here & (z == -INFINITY)
        masked_here += tl.sum(forbidden.to(tl.int32))
        if expects(PRIOR):
            found = found | tl.where(any_of(forbidden & (tl.exp2(log_v) > 0)), 1 << 6, 0)
        else:
            found = found | tl.where(any_of((log_v == -INFINITY) & (z > -INFINITY)), 1 << 7, 0)
    log_v = (t_rest - top) * exponent
    elsewhere = masked - masked_here
    if expects(PRIOR):
        return found | tl.where((tl.exp2(log_v) > 0) & (elsewhere > 0), 1 << 6, 0)
    else:
        return found | tl.where((log_v == -INFINITY) & (elsewhere < CLASSES - TOP), 1 << 7, 0)
