"""What follows the rows of the KD energy: the sum of the energies, and a look at each row whose energy is not finite.

Such a row is rare, so the kernels that compute the rows (kd.py) leave it as it comes, and this one, which reads every energy
anyway, looks its numbers through again. A row with a fault (bkd_fast/ops/faults.py) gets energy NaN and gradient 0, and one
atomic maximum puts a word into the device's fault register (faults.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bkd_fast.kernels.faults import fault_word
from bkd_fast.kernels.half import narrow
from bkd_fast.kernels.kd_row import (
    HARD,
    INFINITY,
    NONE,
    SIGNED,
    SOFT,
    any_of,
    expects,
    log_teacher,
    lowest,
    number_of,
    read_labels,
    real_of,
    settings_of,
    teacher_exponent,
    teacher_row,
)
from bkd_fast.kernels.kd_topk import faults_of_top, read_rest
from bkd_fast.kernels.launching import on_device_of

# the codes that are looked for before 1, 2, ...
TARGET_OUT_OF_RANGE: tl.constexpr = tl.constexpr(9)
TEACHER_INDEX_OUT_OF_RANGE: tl.constexpr = tl.constexpr(12)
# and those that one has another name for
TARGET_NOT_PROBABILITIES: tl.constexpr = tl.constexpr(10)
TARGET_SUM_NOT_ONE: tl.constexpr = tl.constexpr(14)


@triton.jit
def _fault_of(z_base, t_base, y_base, i_base, t_rest, weights_base, label, out_of_range, teacher_stride, s,
              REAL: tl.constexpr, CLASSES: tl.constexpr, TEACHERS: tl.constexpr, PRIOR: tl.constexpr, TOP: tl.constexpr,
              PROBS: tl.constexpr, LABELS: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The first fault of one row, in the order of csrc/kd.h; 0 for none. Pointers are the row's, the rest are scalars."""
    lane = tl.arange(0, BLOCK)
    found = tl.full((), 0, tl.int32)
    live = False
    masked = tl.full((), 0, tl.int32)
    for start in range(0, CLASSES, BLOCK):
        column = start + lane
        here = column < CLASSES
        z = tl.load(z_base + column, mask=here, other=-INFINITY).to(REAL)
        live = live | any_of(z > -INFINITY)
        if TOP:
            masked += tl.sum((here & (z == -INFINITY)).to(tl.int32))
        found = found | tl.where(any_of((z < INFINITY) == 0), 1 << 1, 0)
    found = found | tl.where(live, 0, 1 << 2)
    if TOP:
        found = found | faults_of_top(z_base, t_base, i_base, t_rest, masked, s, REAL, CLASSES, PRIOR, TOP, BLOCK)
    elif PRIOR != NONE:
        for m in range(TEACHERS):
            row = t_base + m * teacher_stride
            top = tl.zeros((), REAL) - INFINITY
            total = tl.zeros((), REAL)
            for start in range(0, CLASSES, BLOCK):
                column = start + lane
                here = column < CLASSES
                t = tl.load(row + column, mask=here, other=0.0 if PROBS else -INFINITY).to(REAL)
                if PROBS:
                    total += tl.sum(t)
                    found = found | tl.where(any_of((t >= 0) == 0), 1 << 5, 0)
                    t = tl.log2(t)
                else:
                    found = found | tl.where(any_of((t < INFINITY) == 0), 1 << 3, 0)
                top = tl.maximum(top, tl.max(t))
            if PROBS:
                found = found | tl.where(tl.abs(total - 1.0) <= s.tolerance_teacher, 0, 1 << 5)
            else:
                found = found | tl.where(top > -INFINITY, 0, 1 << 4)
            top = tl.maximum(top, lowest(REAL))
            for start in range(0, CLASSES, BLOCK):
                column = start + lane
                here = column < CLASSES
                z = tl.load(z_base + column, mask=here, other=-INFINITY).to(REAL)
                t = tl.load(row + column, mask=here, other=0.0 if PROBS else -INFINITY)
                log_v = (log_teacher(t, REAL, PROBS) - top) * teacher_exponent(s, PROBS)
                if expects(PRIOR):
                    found = found | tl.where(any_of((tl.exp2(log_v) > 0) & (z == -INFINITY)), 1 << 6, 0)
                else:
                    found = found | tl.where(any_of((log_v == -INFINITY) & (z > -INFINITY)), 1 << 7, 0)
    if WEIGHTED:
        total = tl.zeros((), tl.float64)
        for m in range(TEACHERS):
            weight = tl.load(weights_base + m)
            total += weight
            found = found | tl.where(weight >= 0, 0, 1 << 8)
        found = found | tl.where(tl.abs(total - 1.0) <= s.tolerance_teacher, 0, 1 << 8)
    if LABELS >= SOFT:
        total = tl.zeros((), REAL)
        size = tl.zeros((), REAL)
        for start in range(0, CLASSES, BLOCK):
            column = start + lane
            here = column < CLASSES
            z = tl.load(z_base + column, mask=here, other=-INFINITY).to(REAL)
            y = tl.load(y_base + column, mask=here, other=0.0).to(REAL)
            total += tl.sum(y)
            size += tl.sum(tl.abs(y))
            if LABELS == SOFT:
                found = found | tl.where(any_of((y >= 0) == 0), 1 << 10, 0)
            found = found | tl.where(any_of((y != 0) & (z == -INFINITY)), 1 << 11, 0)
        allowed = s.tolerance_target
        if LABELS == SIGNED:
            allowed *= tl.maximum(size, 1.0)
        found = found | tl.where((tl.abs(total - 1.0) <= allowed) & (size < INFINITY), 0, 1 << 10)
    elif LABELS == HARD:
        z = tl.load(z_base + tl.maximum(label, 0)).to(REAL)
        found = found | tl.where((label >= 0) & (z == -INFINITY), 1 << 11, 0)
    code = tl.full((), 0, tl.int32)
    for k in tl.static_range(11, 0, -1):
        code = tl.where((found >> k) & 1 != 0, k, code)
    if LABELS == SIGNED:
        code = tl.where(code == TARGET_NOT_PROBABILITIES, TARGET_SUM_NOT_ONE, code)
    if TOP:
        code = tl.where((found >> TEACHER_INDEX_OUT_OF_RANGE) & 1 != 0, TEACHER_INDEX_OUT_OF_RANGE, code)
    if LABELS == HARD:
        code = tl.where(out_of_range, TARGET_OUT_OF_RANGE, code)
    return code


@triton.jit
def _settle_row(logits, teacher, labels, soft, indices, rest, weights, gradient, energy, register, at, rows, weights_stride,
                ignore_index, stamp, s, REAL: tl.constexpr, CLASSES: tl.constexpr, TEACHERS: tl.constexpr,
                PRIOR: tl.constexpr, BY_LABEL: tl.constexpr, TOP: tl.constexpr, PROBS: tl.constexpr, LABELS: tl.constexpr,
                WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Look one row through, and report its fault; a row whose numbers are only large has none, and stays as it is."""
    chain, row = at // rows, at % rows
    z_base, g_base = logits + at * CLASSES, gradient + at * CLASSES
    t_base, y_base, weights_base, i_base, t_rest = z_base, z_base, z_base, indices, s.strength
    label, out_of_range = tl.full((), -1, tl.int32), row < 0
    if PRIOR != NONE:
        t_base = teacher + teacher_row(labels, row, row < rows, CLASSES, BY_LABEL) * (TOP if TOP else CLASSES)
    if TOP:
        i_base = indices + row * TOP
        t_rest = read_rest(rest, row, row < rows, REAL, CLASSES, TOP)
    if WEIGHTED:
        weights_base = weights + row * weights_stride
    if LABELS >= SOFT:
        y_base = soft + row * CLASSES
    elif LABELS == HARD:
        label, out_of_range = read_labels(labels, row, row < rows, ignore_index, s.label_weight, CLASSES, BY_LABEL)
    stride = tl.full((), CLASSES, tl.int64) * rows
    code = _fault_of(z_base, t_base, y_base, i_base, t_rest, weights_base, label, out_of_range, stride, s, REAL, CLASSES,
                     TEACHERS, PRIOR, TOP, PROBS, LABELS, WEIGHTED, BLOCK)  # fmt: skip
    if code != 0:
        tl.atomic_max(register, fault_word(stamp, chain, row, code))
        tl.store(energy + at, float("nan"))
        lane = tl.arange(0, BLOCK)
        zero = tl.zeros((BLOCK,), g_base.dtype.element_ty)
        for start in range(0, CLASSES, BLOCK):
            tl.store(g_base + start + lane, zero, mask=start + lane < CLASSES)


@triton.jit(do_not_specialize=["count", "rows", "weights_stride", "ignore_index", "stamp", "factor", "strength",
                               "inverse_temperature", "label_weight", "smoothing", "scale", "tolerance_teacher",
                               "tolerance_target"])  # fmt: skip
def settle_rows(logits, teacher, labels, soft, indices, rest, weights, gradient, energy, out, register, count, rows,
                weights_stride, ignore_index, stamp, factor, strength, inverse_temperature, label_weight, smoothing, scale,
                tolerance_teacher, tolerance_target, REAL: tl.constexpr, CLASSES: tl.constexpr, TEACHERS: tl.constexpr,
                PRIOR: tl.constexpr, BY_LABEL: tl.constexpr, TOP: tl.constexpr, PROBS: tl.constexpr, LABELS: tl.constexpr,
                WEIGHTED: tl.constexpr, SUMMED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Settle the rows of chunk i of the energies; where SUMMED, out[i] = factor * their sum, added in float64."""
    s = settings_of(
        strength, inverse_temperature, label_weight, smoothing, scale, tolerance_teacher, tolerance_target, REAL
    )
    first = tl.program_id(0).to(tl.int64) * CHUNK
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    start = first
    while start < tl.minimum(first + CHUNK, count):
        e = tl.load(energy + start + lane, mask=start + lane < count, other=0.0)
        total += e.to(tl.float64)
        if any_of((tl.abs(e) < INFINITY) == 0):
            for i in range(BLOCK):
                if start + i < count:
                    one = tl.load(energy + start + i)
                    if (tl.abs(one) < INFINITY) == 0:
                        _settle_row(logits, teacher, labels, soft, indices, rest, weights, gradient, energy, register, start + i,
                                    rows, weights_stride, ignore_index, stamp, s, REAL, CLASSES, TEACHERS, PRIOR, BY_LABEL, TOP,
                                    PROBS, LABELS, WEIGHTED, BLOCK)  # fmt: skip
        start += BLOCK
    if SUMMED:
        tl.store(out + tl.program_id(0), (tl.sum(total) * real_of(factor, REAL)).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["count", "factor"])
def sum_parts(parts, out, count, factor, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """out = factor * the sum of float64 parts, by one program."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    start = tl.full((), 0, tl.int32)
    while start < count:
        total += tl.load(parts + start + lane, mask=start + lane < count, other=0.0)
        start += BLOCK
    tl.store(out, (tl.sum(total) * real_of(factor, REAL)).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["count", "divisor"])
def multiply(gradient, incoming, count, divisor, BLOCK: tl.constexpr):
    """gradient *= incoming / divisor."""
    factor = tl.load(incoming).to(tl.float32 if gradient.dtype.element_ty != tl.float64 else tl.float64) / divisor
    if factor != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        while start < count:
            at = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
            if start + BLOCK <= count:  # unmasked, so that accesses have 16 bytes
                value = tl.load(gradient + at)
                tl.store(gradient + at, narrow(value * factor, gradient.dtype.element_ty))
            else:
                value = tl.load(gradient + at, mask=at < count, other=0.0)
                tl.store(gradient + at, narrow(value * factor, gradient.dtype.element_ty), mask=at < count)
            start += tl.num_programs(0) * BLOCK


# ---- launching ----

BLOCK = 1024
CHUNK = 8192  # energies per program: one program settles most batches, and then its sum is the whole


def settle(
    inputs: Sequence[Tensor | None],
    named: Sequence[Tensor | None],
    weights: Tensor | None,
    gradient: Tensor,
    energy: Tensor,
    weights_stride: int,
    ignore_index: int,
    settings: Sequence[float],
    kinds: Mapping[str, Any],
    factor: float | None,
    register: Tensor,
    stamp: int,
) -> Tensor | None:
    """Settle all rows; `factor` times the sum of their energies, 0-dim, of their dtype, or None where `factor` is.

    The order of the additions depends on nothing but the shape of `energy` (chains, rows). `inputs`, `named`, `settings` and
    `kinds` are those of the kernels in kd.py.
    """
    count, rows = energy.numel(), energy.shape[1]
    double = energy.dtype == torch.float64
    chunks = -(-count // CHUNK)
    total = torch.empty((), dtype=energy.dtype, device=energy.device)
    parts = total if chunks == 1 else torch.empty(chunks, dtype=torch.float64, device=energy.device)
    whole = number_of(1.0 if factor is None else factor, double)
    settle_rows[(chunks,)](
        *inputs, *named, weights, gradient, energy, parts, register, count, rows, weights_stride, ignore_index, stamp,
        whole if chunks == 1 else number_of(1.0, double), *settings, **kinds, SUMMED=factor is not None, CHUNK=CHUNK,
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    if factor is None:
        return None
    if chunks > 1:
        sum_parts[(1,)](parts, total, chunks, whole, REAL=kinds["REAL"], BLOCK=BLOCK, num_warps=8)
    return total


def multiply_(gradient: Tensor, incoming: Tensor, divisor: float) -> None:
    """gradient *= incoming / divisor in place, for a 0-dim tensor `incoming`: where that is 1, as for a loss that is
    differentiated itself, a launch and no traffic. Nothing waits for the device."""
    block = 2048
    programs = min(-(-gradient.numel() // block), 2048)  # enough to fill a GPU, few enough to be gone at once
    with on_device_of(gradient):
        multiply[(programs,)](gradient, incoming, gradient.numel(), divisor, BLOCK=block, num_warps=4)
