"""The KD energy in Triton: the energies of all rows of logits, and `scale` times their gradient.

Three ways, with the same arithmetic (kd_row.py):

    on_chip   up to 16 Ki classes: a row stays in registers; one read, one write
    tiled     above: sums under a running maximum, then the gradient from a second read
    mixture   several teachers: a row is read again for each of them

A top-k teacher (kd_topk.py) is never written out: a row is read without it.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bkd_fast.kernels.kd_row import (
    HARD,
    INFINITY,
    LN2,
    MIXTURE,
    NONE,
    PRIORS,
    SOFT,
    Coefficients,
    add_tile,
    finish_rows,
    gradient_tile,
    kind_of_labels,
    load_tile,
    log_teacher,
    lowest,
    number_of,
    read_labels,
    read_tiles,
    settings_of,
    store_tile,
    streamed,
    sums_of_row,
    teacher_exponent,
    teacher_row,
    top_of_labelled,
    total_of,
    zero_sums,
)
from bkd_fast.kernels.kd_settle import settle
from bkd_fast.kernels.kd_topk import add_teacher, read_rest, store_named, top_of_teacher
from bkd_fast.kernels.launching import on_device_of


@triton.jit(do_not_specialize=["rows", "blocks", "ignore_index", "strength", "inverse_temperature", "label_weight",
                               "smoothing", "scale", "tolerance_teacher", "tolerance_target"])  # fmt: skip
def on_chip(logits, teacher, labels, soft, indices, rest, gradient, energy, rows, blocks, ignore_index, strength,
            inverse_temperature, label_weight, smoothing, scale, tolerance_teacher, tolerance_target,
            REAL: tl.constexpr, CLASSES: tl.constexpr, PRIOR: tl.constexpr, PROBS: tl.constexpr, POWER: tl.constexpr,
            LABELS: tl.constexpr, SMOOTHED: tl.constexpr, BY_LABEL: tl.constexpr, TOP: tl.constexpr, WIDTH: tl.constexpr,
            ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """ROWS rows per program, each in CHUNKS tiles of BLOCK columns that stay in registers as they are stored."""
    s = settings_of(
        strength, inverse_temperature, label_weight, smoothing, scale, tolerance_teacher, tolerance_target, REAL
    )
    chain = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    at = chain.to(tl.int64) * rows + row
    z_base, g_base = logits + at * CLASSES, gradient + at * CLASSES
    t_base, y_base, i_base = z_base, z_base, indices
    if PRIOR != NONE:
        t_base = teacher + teacher_row(labels, row, inside, CLASSES, BY_LABEL) * (TOP if TOP else CLASSES)
    if TOP:
        i_base = indices + row * TOP
    if LABELS >= SOFT:
        y_base = soft + row * CLASSES
    lane = tl.arange(0, BLOCK)[None, :]
    TILED: tl.constexpr = streamed(PRIOR, TOP)
    COUNTED: tl.constexpr = SMOOTHED or TOP > 0

    tiles = ()
    for j in tl.static_range(CHUNKS):
        tile = read_tiles(z_base, t_base, y_base, j * BLOCK + lane, inside, REAL, CLASSES, (j + 1) * BLOCK <= CLASSES, ROWS == 1,
                          TILED, PROBS, LABELS)  # fmt: skip
        tiles = tiles + (tile,)  # noqa: RUF005 (Triton has no unpacking)
    z_most, t_most = tiles[0][0], tiles[0][1]
    for j in tl.static_range(1, CHUNKS):
        z_most = tl.maximum(z_most, tiles[j][0])
        t_most = tl.maximum(t_most, tiles[j][1])
    z_top = tl.maximum(tl.max(z_most, 1, keep_dims=True).to(REAL), lowest(REAL))
    t_top, t_rest = z_top, z_top
    if TOP:
        t_rest = read_rest(rest, row, inside, REAL, CLASSES, TOP)
        t_top = top_of_teacher(t_base, t_rest, inside, REAL, TOP, WIDTH)
    elif PRIOR != NONE:
        t_top = tl.maximum(log_teacher(tl.max(t_most, 1, keep_dims=True), REAL, PROBS), lowest(REAL))

    sums = zero_sums(ROWS, BLOCK, REAL)
    for j in tl.static_range(CHUNKS):
        z, t, y = tiles[j]
        sums = add_tile(sums, z.to(REAL), log_teacher(t, REAL, PROBS), t.to(REAL), y.to(REAL), z_top, t_top, s, TILED, PROBS,
                    POWER, LABELS, COUNTED)  # fmt: skip
    total = total_of(sums, TILED, PROBS, POWER, LABELS, COUNTED)
    if TOP:
        total = add_teacher(
            total, z_base, t_base, i_base, t_rest, inside, z_top, t_top, s, REAL, CLASSES, PRIOR, TOP, WIDTH
        )

    label, out_of_range, x_label = tl.full((ROWS, 1), -1, tl.int32), inside & (row < 0), z_top
    if LABELS == HARD:
        label, out_of_range = read_labels(labels, row, inside, ignore_index, s.label_weight, CLASSES, BY_LABEL)
        x_label = tl.load(z_base + tl.maximum(label, 0), mask=inside, other=0.0).to(REAL) - z_top
        x_label = tl.where(label >= 0, x_label, 0.0)
    e, c = finish_rows(total, label, x_label, out_of_range, s, PRIOR, PROBS, POWER, LABELS, SMOOTHED, BY_LABEL)
    tl.store(energy + at, e, mask=inside)
    if BY_LABEL:
        z_top = top_of_labelled(z_top, label)

    for j in tl.static_range(CHUNKS):
        z, t, y = tiles[j]
        t = log_teacher(t, REAL, PROBS)
        if TOP:
            t = t_rest
        g = gradient_tile(c, z.to(REAL), t, y.to(REAL), j * BLOCK + lane, label, z_top, t_top, s, PRIOR, PROBS, POWER, LABELS,
                          SMOOTHED)  # fmt: skip
        store_tile(g_base, j * BLOCK + lane, inside, g, CLASSES, (j + 1) * BLOCK <= CLASSES, ROWS == 1)
    if TOP:
        store_named(g_base, z_base, t_base, i_base, y_base, inside, label, z_top, t_top, c, s, REAL, CLASSES, PRIOR, POWER,
                    LABELS, SMOOTHED, TOP, WIDTH)  # fmt: skip


@triton.jit
def label_of_row(labels, row, rows, z_base, z_top, ignore_index, s, REAL: tl.constexpr, CLASSES: tl.constexpr,
                 LABELS: tl.constexpr, BY_LABEL: tl.constexpr):  # fmt: skip
    """Of one row: its label or -1, whether the label is out of range, and the label's logit less the largest."""
    label, out_of_range, x_label = tl.full((), -1, tl.int32), row < 0, z_top
    if LABELS == HARD:
        label, out_of_range = read_labels(labels, row, row < rows, ignore_index, s.label_weight, CLASSES, BY_LABEL)
        x_label = tl.where(label >= 0, tl.load(z_base + tl.maximum(label, 0)).to(REAL) - z_top, 0.0)
    return label, out_of_range, x_label


@triton.jit
def _write_tile(g_base, z_base, t_base, y_base, column, label, z_top, t_top, t_rest, c, s, REAL: tl.constexpr,
                CLASSES: tl.constexpr, FULL: tl.constexpr, PRIOR: tl.constexpr, PROBS: tl.constexpr, POWER: tl.constexpr,
                LABELS: tl.constexpr, SMOOTHED: tl.constexpr, TOP: tl.constexpr):  # fmt: skip
    """A tile of one row's gradient, from a second read."""
    z, t, y = read_tiles(z_base, t_base, y_base, column, column >= 0, REAL, CLASSES, FULL, True, streamed(PRIOR, TOP), PROBS,
                         LABELS)  # fmt: skip
    t = log_teacher(t, REAL, PROBS)
    if TOP:
        t = t_rest
    g = gradient_tile(c, z.to(REAL), t, y.to(REAL), column, label, z_top, t_top, s, PRIOR, PROBS, POWER, LABELS,
                      SMOOTHED)  # fmt: skip
    store_tile(g_base, column, column >= 0, g, CLASSES, FULL, True)


@triton.jit(do_not_specialize=["rows", "blocks", "ignore_index", "strength", "inverse_temperature", "label_weight",
                               "smoothing", "scale", "tolerance_teacher", "tolerance_target"])  # fmt: skip
def tiled(logits, teacher, labels, soft, indices, rest, gradient, energy, rows, blocks, ignore_index, strength,
          inverse_temperature, label_weight, smoothing, scale, tolerance_teacher, tolerance_target,
          REAL: tl.constexpr, CLASSES: tl.constexpr, PRIOR: tl.constexpr, PROBS: tl.constexpr, POWER: tl.constexpr,
          LABELS: tl.constexpr, SMOOTHED: tl.constexpr, BY_LABEL: tl.constexpr, TOP: tl.constexpr, WIDTH: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """One row per program, read twice; the second time backwards, so that it begins with what the caches still hold."""
    s = settings_of(
        strength, inverse_temperature, label_weight, smoothing, scale, tolerance_teacher, tolerance_target, REAL
    )
    chain = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks).to(tl.int64)
    at = chain.to(tl.int64) * rows + row
    z_base, g_base = logits + at * CLASSES, gradient + at * CLASSES
    t_base, y_base, i_base = z_base, z_base, indices
    if PRIOR != NONE:
        t_base = teacher + teacher_row(labels, row, row < rows, CLASSES, BY_LABEL) * (TOP if TOP else CLASSES)
    if TOP:
        i_base = indices + row * TOP
    if LABELS >= SOFT:
        y_base = soft + row * CLASSES
    total, z_top, t_top = sums_of_row(z_base, t_base, y_base, s, REAL, CLASSES, streamed(PRIOR, TOP), PROBS, POWER, LABELS,
                                      SMOOTHED or TOP > 0, BLOCK)  # fmt: skip
    t_rest = t_top
    if TOP:
        t_rest = read_rest(rest, row + tl.arange(0, 1)[None, :], row < rows, REAL, CLASSES, TOP)
        t_top = top_of_teacher(t_base, t_rest, row < rows, REAL, TOP, WIDTH)
        total = add_teacher(
            total, z_base, t_base, i_base, t_rest, row < rows, z_top, t_top, s, REAL, CLASSES, PRIOR, TOP, WIDTH
        )

    label, out_of_range, x_label = label_of_row(
        labels, row, rows, z_base, z_top, ignore_index, s, REAL, CLASSES, LABELS, BY_LABEL
    )
    e, c = finish_rows(total, label, x_label, out_of_range, s, PRIOR, PROBS, POWER, LABELS, SMOOTHED, BY_LABEL)
    tl.store(energy + at + tl.arange(0, 1)[None, :], e)
    if BY_LABEL:
        z_top = top_of_labelled(z_top, label)

    lane = tl.arange(0, BLOCK)[None, :]
    whole: tl.constexpr = CLASSES // BLOCK * BLOCK
    if whole < CLASSES:
        _write_tile(g_base, z_base, t_base, y_base, whole + lane, label, z_top, t_top, t_rest, c, s, REAL, CLASSES, False, PRIOR,
                    PROBS, POWER, LABELS, SMOOTHED, TOP)  # fmt: skip
    for i in range(BLOCK, whole + BLOCK, BLOCK):
        _write_tile(g_base, z_base, t_base, y_base, whole - i + lane, label, z_top, t_top, t_rest, c, s, REAL, CLASSES, True,
                    PRIOR, PROBS, POWER, LABELS, SMOOTHED, TOP)  # fmt: skip
    if TOP:
        store_named(g_base, z_base, t_base, i_base, y_base, row < rows, label, z_top, t_top, c, s, REAL, CLASSES, PRIOR, POWER,
                    LABELS, SMOOTHED, TOP, WIDTH)  # fmt: skip


@triton.jit
def _log_gamma_1p(a):
    """ln Gamma(1 + a) for a >= 0 in float64, as csrc/kd.h has it: Stirling's series at an argument shifted to at least 8."""
    x = 1.0 + a
    product = x * 0.0 + 1.0
    for _ in tl.static_range(7):
        low = x < 8.0
        product *= tl.where(low, x, 1.0)
        x += tl.where(low, 1.0, 0.0)
    w = 1.0 / (x * x)
    series = w * (1.0 / 1188 - w * (691.0 / 360360)) - 1.0 / 1680
    series = 1.0 / 12 + w * (-1.0 / 360 + w * (1.0 / 1260 + w * series))
    return (x - 0.5) * tl.log(x) - x + 0.91893853320467274178 + series / x - tl.log(product)


@triton.jit
def _pick(values, slot, m):
    """values[m] of a (1, SLOTS) tensor, (1, 1)."""
    return tl.sum(tl.where(slot == m, values, 0.0), 1, keep_dims=True)


@triton.jit
def _teacher_exponents(t_base, column, top, s, REAL: tl.constexpr, CLASSES: tl.constexpr, PROBS: tl.constexpr):
    """log2 v of a tile of one teacher: 0 at its most probable class."""
    t = load_tile(t_base, column, column >= 0, 0.0 if PROBS else -INFINITY, CLASSES, False, True)
    return (log_teacher(t, REAL, PROBS) - top) * teacher_exponent(s, PROBS)


@triton.jit
def _teacher_share(t_base, column, top, total, s, REAL: tl.constexpr, CLASSES: tl.constexpr, PROBS: tl.constexpr):
    """A tile of one teacher's distribution p_T."""
    return tl.exp2(_teacher_exponents(t_base, column, top, s, REAL, CLASSES, PROBS)) / total


@triton.jit(do_not_specialize=["rows", "blocks", "ignore_index", "teachers", "weights_stride", "strength",
                               "inverse_temperature", "label_weight", "smoothing", "scale", "tolerance_teacher",
                               "tolerance_target"])  # fmt: skip
def mixture(logits, teacher, labels, soft, weights, gradient, energy, rows, blocks, ignore_index,
            teachers, weights_stride, strength, inverse_temperature, label_weight, smoothing, scale, tolerance_teacher,
            tolerance_target, REAL: tl.constexpr, CLASSES: tl.constexpr,
            PROBS: tl.constexpr, POWER: tl.constexpr, LABELS: tl.constexpr, SMOOTHED: tl.constexpr, WEIGHTED: tl.constexpr,
            SLOTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One row per program and several teachers, SLOTS at most: with l_m = log(w_m Dir_m) and r = softmax(l), a row behaves like
    one with a Dirichlet prior whose teacher is sum_m r_m p_m. What is kept of each teacher lies in a (1, SLOTS) tensor."""
    s = settings_of(
        strength, inverse_temperature, label_weight, smoothing, scale, tolerance_teacher, tolerance_target, REAL
    )
    chain = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks).to(tl.int64)
    at = chain.to(tl.int64) * rows + row
    z_base, g_base = logits + at * CLASSES, gradient + at * CLASSES
    t_base, y_base = teacher + row * CLASSES, z_base
    stride = tl.full((), 1, tl.int64) * rows * CLASSES
    if LABELS >= SOFT:
        y_base = soft + row * CLASSES
    lane, slot = tl.arange(0, BLOCK)[None, :], tl.arange(0, SLOTS)[None, :]

    # the label's terms and the student's sum, as if there were no prior
    total, z_top, _no_teacher = sums_of_row(
        z_base, z_base, y_base, s, REAL, CLASSES, NONE, False, POWER, LABELS, SMOOTHED, BLOCK
    )
    label, out_of_range, x_label = label_of_row(
        labels, row, rows, z_base, z_top, ignore_index, s, REAL, CLASSES, LABELS, False
    )
    e, c = finish_rows(total, label, x_label, out_of_range, s, NONE, False, POWER, LABELS, SMOOTHED, False)
    factor = s.scale * s.strength * s.inverse_temperature
    student = c.student + factor / total.student  # beside c.student, which is of w = u where POWER is 1
    log_student = tl.log(total.student)

    # of each teacher: maximum, sum, entropy, and score l_m without its weight, in float64: a difference of large numbers
    strength64 = tl.zeros((1, 1), tl.float64) + s.strength
    constant = _log_gamma_1p(strength64 + (CLASSES - 1))
    nothing = tl.zeros((1, SLOTS), tl.float64)
    tops, totals, entropies, scores = nothing.to(REAL), nothing.to(REAL), nothing, nothing
    good = e == e
    for m in range(teachers):
        base = t_base + m * stride
        t_total, _same, t_top = sums_of_row(z_base, base, y_base, s, REAL, CLASSES, MIXTURE, PROBS, 1, 0, False, BLOCK)
        cross = log_student - t_total.cross * s.inverse_temperature / t_total.teacher
        gammas = tl.zeros((1, BLOCK), tl.float64)
        others, ties = tl.zeros((1, BLOCK), tl.float64), tl.zeros((1, BLOCK), tl.float64)
        for start in range(0, CLASSES, BLOCK):
            exponents = _teacher_exponents(base, start + lane, t_top, s, REAL, CLASSES, PROBS)
            v = tl.exp2(exponents)
            p = v / t_total.teacher
            gammas += tl.where(start + lane < CLASSES, _log_gamma_1p(strength64 * p.to(tl.float64)), 0.0)
            others += tl.where(exponents == 0, 0.0, v).to(tl.float64)
            ties += (exponents == 0).to(tl.float64)
        # 1 + what is small beside it in float64: a confident teacher's entropy, by which it weighs, is of that size
        sure = tl.sum(ties, 1, keep_dims=True)
        entropy = tl.log(sure + tl.sum(others, 1, keep_dims=True)) - (t_total.slope * LN2 / t_total.teacher).to(
            tl.float64
        )
        score = constant - tl.sum(gammas, 1, keep_dims=True) - strength64 * cross.to(tl.float64)
        good = good & (tl.abs(cross) < INFINITY) & (tl.abs(entropy) < INFINITY)
        if PROBS:
            good = good & (tl.abs(t_total.given - 1.0) <= s.tolerance_teacher)
        tops, totals = tl.where(slot == m, t_top, tops), tl.where(slot == m, t_total.teacher, totals)
        entropies = tl.where(slot == m, entropy, entropies)
        scores = tl.where(slot == m, score, scores)

    if WEIGHTED:
        shares = tl.load(weights + row * weights_stride + slot, mask=slot < teachers, other=0.0)
        good = good & (tl.abs(tl.sum(shares, 1, keep_dims=True) - 1.0) <= s.tolerance_teacher)
        good = good & (tl.min(tl.where(shares >= 0, shares, -1.0), 1, keep_dims=True) >= 0)
    else:
        # w_m = 1 - H_m / sum H (docs/methods.md), which one teacher or entropies of 0 would leave undefined
        entropy = tl.sum(entropies, 1, keep_dims=True)
        even = (entropy <= 0) | (teachers == 1)
        shares = tl.where(even, 1.0, 1.0 - entropies / tl.where(even, 1.0, entropy))
        shares = tl.where(slot < teachers, shares, 0.0)
    scores = tl.where(shares > 0, tl.log(shares) + scores, -INFINITY)
    top = tl.max(scores, 1, keep_dims=True)
    chances = tl.exp(scores - top)
    chance = tl.sum(chances, 1, keep_dims=True)
    e += (tl.log(tl.sum(shares, 1, keep_dims=True)) - top - tl.log(chance)).to(REAL)
    e = tl.where(good, e, float("nan"))
    tl.store(energy + at + tl.arange(0, 1)[None, :], e)

    parts = (chances / chance).to(REAL) * factor
    c = Coefficients(student, c.plain, c.teacher, c.mean, c.even, c.peak)
    for start in range(0, CLASSES, BLOCK):
        column = start + lane
        z, _no_tile, y = read_tiles(
            z_base, z_base, y_base, column, column >= 0, REAL, CLASSES, False, True, NONE, False, LABELS
        )
        z = z.to(REAL)
        g = gradient_tile(c, z, z, y.to(REAL), column, label, z_top, z_top, s, MIXTURE, False, POWER, LABELS, SMOOTHED)
        for m in range(teachers):
            p = _teacher_share(
                t_base + m * stride, column, _pick(tops, slot, m), _pick(totals, slot, m), s, REAL, CLASSES, PROBS
            )
            g -= p * _pick(parts, slot, m)
        store_tile(g_base, column, column >= 0, g, CLASSES, False, True)


# ---- launching ----

# Logits of a row that a thread of `on_chip` holds. With the teacher's and the exponentials of both that is about 128 registers.
ON_CHIP_LOGITS = 32
TILE, TILE_WARPS = (
    2048,
    4,
)  # of `tiled`: 16 columns per thread, whose sums take 64 registers and four tiles of a row's bytes
MIXTURE_TILE = 1024


class Shape(NamedTuple):
    """How `on_chip` cuts the rows."""

    rows: int  # per program
    block: int  # columns of a tile
    chunks: int  # tiles of a row
    warps: int


@cache  # Triton's own arithmetic costs the host microseconds a call
def shape_of(classes: int, bits: int, plain: bool) -> Shape | None:
    """The launch for rows of `classes` whose widest stored element has `bits`; None: they need tiles. `plain`: there are student
    and teacher logits alone, and two exponentials serve energy and gradient.

    classes    threads per row       why
    to 512     classes / 16, 1 to 32  what a row costs (logarithms, shuffles) is shared by 16 logits of each of its threads; two
                                      threads at least, where one access does not hold the row: a store of a thread's own row
                                      would touch a 32-byte sector for every 4 bytes
    to 1024    32                     a warp alone needs no barrier and no mask of rows
    to 16384   64 to 512              as many warps as keep ON_CHIP_LOGITS per thread, or half of them: more would spill
    """
    wide = 2 if bits == 64 else 1  # float64 takes two registers
    access = 128 // bits  # elements of 16 bytes
    if classes * wide <= 512:
        access = math.gcd(classes, access)  # what the rows' alignment allows
        threads = triton.next_power_of_2(triton.cdiv(classes, 16 // wide))
        if classes > access:
            threads = max(threads, 2)
        block = triton.next_power_of_2(threads * access)
        return Shape(128 // threads, block, triton.cdiv(classes, block), 4)
    each = ON_CHIP_LOGITS // wide // (1 if plain else 2)
    warps = triton.next_power_of_2(triton.cdiv(classes, 32 * each))
    if warps > 16 // wide:
        return None
    block = 32 * warps * access
    return Shape(1, block, triton.cdiv(classes, block), warps)


@cache
def mixture_shape(classes: int, double: bool) -> tuple[int, int]:
    """Columns of a tile and warps of `mixture`: 8 columns per thread, in float64 2; its log-gammas always are float64."""
    block = min(max(128, triton.next_power_of_2(classes)), MIXTURE_TILE // (4 if double else 1))
    return block, max(1, block // (64 if double else 256))


@cache
def named_width(top: int, rows: int, warps: int) -> int:
    """The named classes of a top-k teacher that a program takes at once: 8 per thread at most, and 1 in the largest programs,
    which have no registers to spare."""
    return min(triton.next_power_of_2(top), 256 * warps // rows, 512)


def energy_and_gradient(
    logits: Tensor,
    teacher: Tensor | None,
    indices: Tensor | None,
    rest: Tensor | None,
    labels: Tensor | None,
    soft: Tensor | None,
    weights: Tensor | None,
    *,
    prior: str,
    teacher_is_probs: bool,
    teacher_by_label: bool,
    prior_strength: float,
    temperature: float,
    label_weight: float,
    label_smoothing: float,
    signed_target: bool,
    ignore_index: int,
    scale: float,
    tolerance_teacher: float,
    tolerance_target: float,
    total_factor: float | None,
    register: Tensor,
    stamp: int,
) -> tuple[Tensor, Tensor]:
    """The energies (chains, rows) or `total_factor` times their sum, and `scale` times the gradient of their sum, like `logits`.

    Energies are float32, for float64 logits float64. Two launches, and nothing waits for the device.

    Args:
        logits: (chains, rows, classes).
        teacher: (teachers, rows, classes) logits or probabilities, or None where `prior` is "none"; with `indices`
            (1, rows, k) logits; with `teacher_by_label`, for the reverse KL alone, (1, classes, classes).
        indices, rest: int32 or int64 (rows, k) and float32 (rows,), a top-k teacher's; or None.
        labels: (rows,) int64, or None.
        soft: (rows, classes), or None.
        weights: (teachers,) or (rows, teachers) float64; None: the entropy weights.
        register, stamp: see kd_settle.py.
        others: as in bkd_fast/ops/kd.py. All tensors are contiguous and on one device.
    """
    chains, rows, classes = logits.shape
    double = logits.dtype == torch.float64
    gradient = torch.empty_like(logits)
    energy = torch.empty((chains, rows), dtype=torch.float64 if double else torch.float32, device=logits.device)
    if label_weight == 0:
        soft = None
    if prior == "none":
        temperature = 1.0
    settings = [
        number_of(x, double)
        for x in (
            prior_strength,
            1 / temperature,
            label_weight,
            label_smoothing,
            scale,
            tolerance_teacher,
            tolerance_target,
        )
    ]
    kinds = {
        "REAL": tl.float64 if double else tl.float32,
        "CLASSES": classes,
        "PROBS": teacher_is_probs and prior != "none",
        "LABELS": kind_of_labels(labels, soft, signed_target),
    }
    forms = {
        "POWER": int(temperature) if temperature in (1, 2, 4) else 0,
        "SMOOTHED": label_smoothing > 0 and kinds["LABELS"] != 0,
    }
    inputs, named = (logits, teacher, labels, soft), (indices, rest)
    top = 0 if indices is None else indices.shape[1]
    teachers = 1 if teacher is None else len(teacher)
    weights_stride = teachers if weights is not None and weights.dim() == 2 else 0
    with on_device_of(logits):
        if prior == "mixture":
            block, warps = mixture_shape(classes, double)
            mixture[(chains * rows,)](
                *inputs, weights, gradient, energy, rows, rows, ignore_index, teachers, weights_stride, *settings,
                **kinds, **forms, WEIGHTED=weights is not None, SLOTS=triton.next_power_of_2(teachers), BLOCK=block,
                num_warps=warps,
            )  # fmt: skip
        else:
            bits = (
                64
                if double
                else 8 * max(x.element_size() for x in (logits, None if top else teacher, soft) if x is not None)
            )
            plain = prior in ("none", "dirichlet") and soft is None and forms["POWER"] != 0 and not forms["SMOOTHED"]
            shape = shape_of(classes, bits, plain)
            if shape is None:
                tiled[(chains * rows,)](
                    *inputs, *named, gradient, energy, rows, rows, ignore_index, *settings, **kinds, **forms,
                    PRIOR=PRIORS[prior], BY_LABEL=teacher_by_label, TOP=top, WIDTH=named_width(top, 1, TILE_WARPS),
                    BLOCK=TILE // 2 if double else TILE, num_warps=TILE_WARPS,
                )  # fmt: skip
            else:
                blocks = -(-rows // shape.rows)
                on_chip[(chains * blocks,)](
                    *inputs, *named, gradient, energy, rows, blocks, ignore_index, *settings, **kinds, **forms,
                    PRIOR=PRIORS[prior], BY_LABEL=teacher_by_label, TOP=top, WIDTH=named_width(top, shape.rows, shape.warps),
                    ROWS=shape.rows, BLOCK=shape.block, CHUNKS=shape.chunks, num_warps=shape.warps,
                )  # fmt: skip
        total = settle(
            inputs, named, weights, gradient, energy, weights_stride, ignore_index, settings,
            {**kinds, "PRIOR": PRIORS[prior], "BY_LABEL": teacher_by_label, "TOP": top, "TEACHERS": teachers,
             "WEIGHTED": weights is not None},
            total_factor, register, stamp,
        )  # fmt: skip
    return (energy if total is None else total), gradient
