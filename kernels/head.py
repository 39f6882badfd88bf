"""The head step in two launches: statistics of every row of logits, then gradient and Langevin step of K linear heads at once.

The second forms d energy / d logits tile by tile in registers, accumulates its product with the features on tensor cores, and
steps the weights by that tile of the gradient: the gradient never reaches memory. A program owns BLOCK_C classes by BLOCK_F
features of one chain, and goes through all rows; the chains are more programs of the same launch.

Budget, counted on sm_90 (tests/kernels/variants_head.py holds the loop's). Per weight: 8 bytes, and 60 instructions for the
step and a quarter of a Philox call; 140 where the number of features is no multiple of 4, so that each element makes a call
of its own. Per logit of a tile: 8 bytes of student and teacher, 2 exponentials (3 if T is none of 1, 2, 4) and 76 instructions,
mostly to split and move the factors, beside 3 BLOCK_F multiply-adds on tensor cores (54 for bfloat16 features).
features / BLOCK_F programs form the same logits' gradient; all but the first find them in the L2 cache. The first launch
takes 27 instructions a logit on long rows, and reads each twice.

Float32 factors are split into two TF32 numbers of 11 bits, and three of the four products taken (what is left out is below
2^-21 of a product): at the published rates of an H100 that is 2.5 times as fast as float32 units, and the sums are float32,
so the gradient is one of float32; plain TF32 would add a noise of its own to it. float16 features are TF32 numbers as they
are. Beside bfloat16 features the other factor is split into three bfloat16 numbers, which hold its 24 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bkd_fast.kernels.arithmetic import INTERPRETED, fma
from bkd_fast.kernels.faults import fault_word
from bkd_fast.kernels.half import narrow, widen
from bkd_fast.kernels.noise import blocks_of, normal_pair, normals_of, words_of

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234663852886e38)
LANGEVIN = tl.constexpr(0)  # the tag of csrc/noise.h

# planes of the statistics, float32 (5, chains, rows):
#   dz_c = LABEL e^(z_c - TOP) - [c = y] label_share
#          + PRIOR_STUDENT e^((z_c - TOP) / T) - PRIOR_TEACHER e^((t_c - TEACHER_TOP) / T)
# TOP is NaN in a row with a fault, whose dz is 0
TOP, LABEL, PRIOR_STUDENT, TEACHER_TOP, PRIOR_TEACHER = (tl.constexpr(plane) for plane in range(5))
PLANES = 5

STATISTICS_TILE = 1024  # logits of a tile of the first launch: 8 a thread
BLOCK_R = 32
# most classes -> (BLOCK_C, BLOCK_F, warps) of the second launch: 16 or 32 sums a thread (64 spill); a tile of 64 x 128 takes
# an eighth of a byte of features and logits from the L2 cache per multiply-add
TILES = ((16, (16, 128, 4)), (32, (32, 128, 4)), (float("inf"), (64, 128, 8)))

# the codes of csrc/kd.h
NO_FAULT, LOGITS_NOT_FINITE, LOGITS_ALL_MASKED, TEACHER_NOT_FINITE, TEACHER_ALL_MASKED = (
    tl.constexpr(i) for i in range(5)
)
TEACHER_ON_MASKED_CLASS, TARGET_OUT_OF_RANGE, TARGET_ON_MASKED_CLASS = (tl.constexpr(i) for i in (6, 9, 11))


@triton.jit
def _exponentials(distance, inverse_temperature, POWER: tl.constexpr):
    """e^distance and e^(distance / T): one exponential where T is POWER = 1, 2 or 4, two where it is none of them (0)."""
    tempered = tl.exp2(distance * (inverse_temperature * LOG2E))
    if POWER == 1:
        plain = tempered
    elif POWER == 2:
        plain = tempered * tempered
    elif POWER == 4:
        squared = tempered * tempered
        plain = squared * squared
    else:
        plain = tl.exp2(distance * LOG2E)
    return plain, tempered


@triton.jit(do_not_specialize=["all_rows", "rows", "stamp", "ignore_index"])
def row_statistics_kernel(
    logits, teacher, target, statistics, energy, register, stamp, all_rows, rows,
    prior_strength, inverse_temperature, label_weight, ignore_index,
    CLASSES: tl.constexpr, PRIOR: tl.constexpr, LABELS: tl.constexpr, POWER: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Energy and statistics of ROWS rows of (chains, rows, classes) logits; two passes over each, the second from cache."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < all_rows
    data_row = row % rows
    mine = row.to(tl.int64) * CLASSES
    theirs = data_row.to(tl.int64) * CLASSES
    largest = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    largest_teacher = largest
    for first in range(0, CLASSES, BLOCK):
        c = first + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None] & (c < CLASSES)
        largest = tl.maximum(largest, tl.load(logits + mine[:, None] + c, mask=inside, other=float("-inf")))
        if PRIOR:
            t = widen(tl.load(teacher + theirs[:, None] + c, mask=inside, other=float("-inf")), tl.float32)
            largest_teacher = tl.maximum(largest_teacher, t)
    # finite where all is masked, so that -inf minus it stays -inf and the sums are 0
    top, teacher_top = tl.maximum(tl.max(largest, 1), -LARGEST), tl.maximum(tl.max(largest_teacher, 1), -LARGEST)
    sum_plain = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_tempered, sum_teacher, sum_cross = sum_plain, sum_plain, sum_plain
    for first in range(0, CLASSES, BLOCK):
        c = first + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None] & (c < CLASSES)
        z = tl.load(logits + mine[:, None] + c, mask=inside, other=float("-inf"))
        distance = z - top[:, None]
        plain, tempered = _exponentials(distance, inverse_temperature, POWER)
        sum_plain += plain
        if PRIOR:
            t = widen(tl.load(teacher + theirs[:, None] + c, mask=inside, other=float("-inf")), tl.float32)
            p = tl.exp2((t - teacher_top[:, None]) * (inverse_temperature * LOG2E))
            sum_tempered += tempered
            sum_teacher += p
            sum_cross += tl.where(p == 0, 0.0, p * distance)  # p is NaN where t is
    plain = tl.sum(sum_plain, 1)
    # NaN and +inf make NaN sums, a mask throughout sums of 0, a teacher on a masked class an infinite one
    fault = tl.where(plain != plain, LOGITS_NOT_FINITE, tl.where(plain == 0, LOGITS_ALL_MASKED, NO_FAULT))
    value = tl.zeros((ROWS,), tl.float32)
    scale = 1.0 / rows
    out = statistics + row
    if PRIOR:
        tempered, p, cross = tl.sum(sum_tempered, 1), tl.sum(sum_teacher, 1), tl.sum(sum_cross, 1)
        of_teacher = tl.where(
            p != p,
            TEACHER_NOT_FINITE,
            tl.where(p == 0, TEACHER_ALL_MASKED, tl.where(cross == float("-inf"), TEACHER_ON_MASKED_CLASS, NO_FAULT)),
        )
        fault = tl.where(fault == NO_FAULT, of_teacher, fault)
        value += prior_strength * (tl.log(tempered) - cross * inverse_temperature / p)
        factor = scale * prior_strength * inverse_temperature
        tl.store(out + PRIOR_STUDENT * all_rows, factor / tempered, mask=there)
        tl.store(out + TEACHER_TOP * all_rows, teacher_top, mask=there)
        tl.store(out + PRIOR_TEACHER * all_rows, factor / p, mask=there)
    if LABELS:
        y = tl.load(target + data_row, mask=there, other=0)
        labelled = y != ignore_index
        is_class = (y >= 0) & (y < CLASSES)
        z = tl.load(logits + mine + tl.where(is_class, y, 0), mask=there, other=0.0)
        weight = tl.where(labelled, label_weight, 0.0)
        on_masked = labelled & (z == float("-inf"))
        fault = tl.where((fault == NO_FAULT) & on_masked, TARGET_ON_MASKED_CLASS, fault)
        fault = tl.where(labelled & (is_class == 0), TARGET_OUT_OF_RANGE, fault)
        value += tl.where(labelled, label_weight * (tl.log(plain) - (z - top)), 0.0)
        tl.store(out + LABEL * all_rows, scale * weight / plain, mask=there)
    bad = fault != NO_FAULT
    tl.store(out + TOP * all_rows, tl.where(bad, float("nan"), top), mask=there)
    tl.store(energy + row, tl.where(bad, float("nan"), value), mask=there)
    word = fault_word(stamp, row // rows, row % rows, fault)
    tl.atomic_max(register + tl.zeros(row.shape, tl.int32), word, mask=there & (fault != NO_FAULT))


@triton.jit
def _logit_gradient(
    logits, teacher, target, statistics, all_rows, r, rows, c, inverse_temperature, label_share, ignore_index,
    CLASSES: tl.constexpr, PRIOR: tl.constexpr, LABELS: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """d energy / d logits (classes c, rows r) of a chain, whose first row `logits` and `statistics` point to."""
    there = r < rows
    inside = (c < CLASSES)[:, None] & there[None, :]
    at = r.to(tl.int64)[None, :] * CLASSES + c[:, None]
    top = tl.load(statistics + TOP * all_rows + r, mask=there, other=0.0)
    z = tl.load(logits + at, mask=inside, other=float("-inf"))
    plain, tempered = _exponentials(z - top[None, :], inverse_temperature, POWER)
    gradient = tl.zeros(plain.shape, tl.float32)
    if PRIOR:
        student_share = tl.load(statistics + PRIOR_STUDENT * all_rows + r, mask=there, other=0.0)
        teacher_share = tl.load(statistics + PRIOR_TEACHER * all_rows + r, mask=there, other=0.0)
        teacher_top = tl.load(statistics + TEACHER_TOP * all_rows + r, mask=there, other=0.0)
        t = widen(tl.load(teacher + at, mask=inside, other=float("-inf")), tl.float32)
        p = tl.exp2((t - teacher_top[None, :]) * (inverse_temperature * LOG2E))
        gradient = tl.fma(tempered, student_share[None, :], -(p * teacher_share[None, :]))
    if LABELS:
        share = tl.load(statistics + LABEL * all_rows + r, mask=there, other=0.0)
        y = tl.load(target + r, mask=there, other=-1)
        gradient = tl.fma(plain, share[None, :], gradient)
        hit = (c[:, None] == y[None, :]) & (y != ignore_index)[None, :]
        gradient = tl.where(hit, gradient - label_share, gradient)
    return tl.where((top == top)[None, :], gradient, 0.0)


@triton.jit
def _add_product(total, a, b):
    """total + a b, (M, K) float32 by (K, N) features, as good as float32 arithmetic (the head of this file)."""
    if b.dtype == tl.bfloat16:
        high = narrow(a, tl.bfloat16)
        rest = a - widen(high, tl.float32)
        middle = narrow(rest, tl.bfloat16)
        low = narrow(rest - widen(middle, tl.float32), tl.bfloat16)
        return _add_bfloat16(_add_bfloat16(_add_bfloat16(total, low, b), middle, b), high, b)
    else:
        a_high, a_low = _tf32_parts(a)
        if b.dtype == tl.float16:  # 11 bits: exact as TF32
            total = tl.dot(a_low, b.to(tl.float32), total, input_precision="tf32")
            return tl.dot(a_high, b.to(tl.float32), total, input_precision="tf32")
        else:
            b_high, b_low = _tf32_parts(b)
            total = tl.dot(a_low, b_high, total, input_precision="tf32")
            total = tl.dot(a_high, b_low, total, input_precision="tf32")
            return tl.dot(a_high, b_high, total, input_precision="tf32")


@triton.jit
def _tf32_parts(x):
    """The leading 11 bits of x, and the rest of it."""
    high = (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _add_bfloat16(total, a, b):
    if INTERPRETED:  # there tl.dot multiplies the bits
        return tl.dot(widen(a, tl.float32), widen(b, tl.float32), total)
    else:
        return tl.dot(a, b, total)


@triton.jit
def _noise_of_tile(
    c, first_feature, seed, step, chain, parameter,
    FEATURES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """xi of W's elements (c, first_feature ..), float32 (BLOCK_C, BLOCK_F)."""
    begin = c.to(tl.int64) * FEATURES + first_feature
    if FEATURES % 4 == 0:  # four neighbours are one block
        block = (begin // 4)[:, None] + tl.arange(0, BLOCK_F // 4)[None, :]
        w0, w1, w2, w3 = words_of(block.to(tl.uint64), seed, step, chain, parameter, LANGEVIN)
        z0, z1 = normal_pair(w0, w1)
        z2, z3 = normal_pair(w2, w3)
        return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK_C, BLOCK_F))
    else:  # each element asks for its block, and takes its number of the four
        element = begin[:, None] + tl.arange(0, BLOCK_F)[None, :]
        w0, w1, w2, w3 = words_of((element // 4).to(tl.uint64), seed, step, chain, parameter, LANGEVIN)
        place = (element % 4).to(tl.int32)
        even, odd = normal_pair(tl.where(place < 2, w0, w2), tl.where(place < 2, w1, w3))
        return tl.where(place % 2 == 0, even, odd)


@triton.jit
def _step(theta, inside, gradient, noise, nonfinite, lr, decay, sigma, DECAY: tl.constexpr, NOISE: tl.constexpr):
    """The Langevin step of csrc/langevin.h; elements whose gradient is not finite keep their value, and set the flag."""
    old = tl.load(theta, mask=inside, other=0.0)
    drift = gradient
    if DECAY:
        drift = fma(decay, old, gradient)
    new = fma(-lr, drift, old)
    if NOISE:
        new = fma(sigma, noise, new)
    finite = tl.abs(gradient) <= LARGEST
    tl.store(theta, tl.where(finite, new, old), mask=inside)
    found = tl.max(tl.ravel((inside & (finite == 0)).to(tl.int32)), 0)
    tl.store(nonfinite, True, mask=found != 0)


@triton.jit(
    do_not_specialize=[
        "all_rows", "rows", "ignore_index", "seed", "step", "chain", "weight_parameter", "bias_parameter",
    ]
)  # fmt: skip
def head_step_kernel(
    weight, bias, x, logits, teacher, target, statistics, nonfinite, all_rows, rows,
    inverse_temperature, label_share, ignore_index, lr, decay, sigma,
    seed: tl.uint64, step: tl.int64, chain, weight_parameter, bias_parameter,
    PRIOR: tl.constexpr, LABELS: tl.constexpr, POWER: tl.constexpr, BIAS: tl.constexpr, DECAY: tl.constexpr,
    NOISE: tl.constexpr, CLASSES: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """W and b of one chain's BLOCK_C classes and BLOCK_F features take their step. One-dimensional grid, features fastest."""
    tiles_f = tl.cdiv(FEATURES, BLOCK_F)
    tiles_c = tl.cdiv(CLASSES, BLOCK_C)
    tile_f = tl.program_id(0) % tiles_f
    tile_c = tl.program_id(0) // tiles_f % tiles_c
    k = tl.program_id(0) // (tiles_f * tiles_c)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    f = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    logits += k.to(tl.int64) * rows * CLASSES
    statistics += k.to(tl.int64) * rows

    gradient = tl.zeros((BLOCK_C, BLOCK_F), tl.float32)
    columns = tl.zeros(
        (BLOCK_C, BLOCK_R), tl.float32
    )  # of the bias: every program sums them, the first of its classes steps
    for first in range(0, rows, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        dz = _logit_gradient(
            logits, teacher, target, statistics, all_rows, r, rows, c, inverse_temperature, label_share,
            ignore_index, CLASSES, PRIOR, LABELS, POWER,
        )  # fmt: skip
        at = r.to(tl.int64)[:, None] * FEATURES + f[None, :]
        inside = (r < rows)[:, None] & (f < FEATURES)[None, :]
        gradient = _add_product(gradient, dz, tl.load(x + at, mask=inside, other=0.0))
        if BIAS:
            columns += dz

    noise = gradient
    if NOISE:
        noise = _noise_of_tile(c, tile_f * BLOCK_F, seed, step, chain + k, weight_parameter, FEATURES, BLOCK_C, BLOCK_F)
    inside = (c < CLASSES)[:, None] & (f < FEATURES)[None, :]
    at = (k.to(tl.int64) * CLASSES + c.to(tl.int64))[:, None] * FEATURES + f[None, :]
    _step(weight + at, inside, gradient, noise, nonfinite, lr, decay, sigma, DECAY, NOISE)
    if BIAS:  # noqa: SIM102 (known when compiling; the next is known when running)
        if tile_f == 0:
            sums = tl.sum(columns, 1)
            noise_of_sums = sums
            if NOISE:
                blocks = blocks_of(tile_c * (BLOCK_C // 4), BLOCK_C, 4)
                noise_of_sums = normals_of(blocks, seed, step, chain + k, bias_parameter, LANGEVIN, BLOCK_C)
            theta = bias + k.to(tl.int64) * CLASSES + c
            _step(theta, c < CLASSES, sums, noise_of_sums, nonfinite + 1, lr, decay, sigma, DECAY, NOISE)


def statistics_tile(classes: int) -> tuple[int, int]:
    """Columns and rows of a tile of the first launch."""
    columns = min(triton.next_power_of_2(classes), STATISTICS_TILE)
    return columns, STATISTICS_TILE // columns


def head_step_(
    logits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    target: Tensor | None,
    teacher: Tensor | None,
    register: Tensor,
    stamp: int,
    *,
    prior_strength: float,
    temperature: float,
    label_weight: float,
    ignore_index: int,
    lr: float,
    decay: float,
    sigma: float,
    seed: int,
    chain: int,
    step: int,
    weight_parameter: int,
    bias_parameter: int,
) -> tuple[Tensor, Tensor]:
    """Step `weight` (chains, classes, features) and `bias` (chains, classes), given their logits (chains, rows, classes) on x
    (rows, features); all contiguous. Returns the energies (chains, rows), NaN in rows with a fault, and bool (2,): whether a
    gradient of the weight, of the bias, was not finite somewhere. Faults go to the fault register.
    """
    chains, rows, classes = logits.shape
    features = x.shape[1]
    energy = torch.empty((chains, rows), dtype=torch.float32, device=x.device)
    statistics = torch.empty((PLANES, chains, rows), dtype=torch.float32, device=x.device)
    nonfinite = torch.zeros(2, dtype=torch.bool, device=x.device)
    terms = {
        "PRIOR": teacher is not None,
        "LABELS": target is not None,
        "POWER": int(temperature) if temperature in (1.0, 2.0, 4.0) else 0,
    }
    block, rows_each = statistics_tile(classes)
    row_statistics_kernel[(triton.cdiv(chains * rows, rows_each),)](
        logits, teacher, target, statistics, energy, register, stamp, chains * rows, rows, prior_strength, 1 / temperature,
        label_weight, ignore_index, CLASSES=classes, **terms, ROWS=rows_each, BLOCK=block, num_warps=4,
    )  # fmt: skip
    block_c, block_f, warps = next(tile for most, tile in TILES if classes <= most)
    grid = chains * triton.cdiv(classes, block_c) * triton.cdiv(features, block_f)
    head_step_kernel[(grid,)](
        weight, bias, x, logits, teacher, target, statistics, nonfinite, chains * rows, rows,
        1 / temperature, label_weight / rows, ignore_index, lr, decay, sigma, seed, step, chain, weight_parameter,
        bias_parameter, **terms, BIAS=bias is not None, DECAY=decay != 0, NOISE=sigma != 0, CLASSES=classes, FEATURES=features,
        BLOCK_C=block_c, BLOCK_F=block_f, BLOCK_R=BLOCK_R, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return energy, nonfinite
