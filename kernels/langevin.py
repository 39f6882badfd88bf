"""The Langevin step in Triton: every row of a launch table (table.py) in one launch, the noise made in registers.

The arithmetic and its order are csrc/langevin.h's, and the result is bit-equal to the CPU's. One program takes one chunk, tile
by tile, 8 elements for each thread (4 in float64, with moments or with a rule's state); full tiles of tensors whose addresses
are multiples of 16 bytes go without masks, by 16-byte accesses (8-byte for 16-bit tensors beside wider ones), the rest through
the masked twin.

Budget per element on sm_80 and sm_90, no spills (in brackets, the instructions that an H100 at 3 TB/s has time for):
    float32 SGLD                          12 bytes   34 instructions   (118)
    with a prior and the non-finite rule  12         38                (118)
    with posterior moments                28         48                (275)
    bfloat16 rounded to nearest            6         40                (59)
    bfloat16 rounded stochastically        6         60                (59)
    bfloat16 and float32 master           12         41                (118)
    float32, prior and non-finite rule: sghmc 20, 45    baoab 20, 46    sgnht 28, 50    rmsprop 20, 92    adam 28, 96
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bkd_fast.kernels.arithmetic import INTERPRETED, fma
from bkd_fast.kernels.half import exponent_field, narrow, round_stochastically, widen
from bkd_fast.kernels.noise import blocks_of, element_words_of, normals_of
from bkd_fast.kernels.rules import NUMBERS, advance
from bkd_fast.kernels.table import Table, chain_stride

WARPS = 4
# at most: 8 programs on a multiprocessor, or 7 where 64 would spill; the compiler's own choice is up to 128
REGISTERS = {torch.float32: 64, torch.bfloat16: 64, torch.float16: 72, torch.float64: 72}
ROOTS = ("rmsprop", "adam")  # rules with roots and quotients, which take more
# the prior's share of the gradient
FLAT, CENTRED_AT_ZERO, CENTRED = (tl.constexpr(kind) for kind in range(3))
LANGEVIN, STOCHASTIC_ROUNDING = tl.constexpr(0), tl.constexpr(1)  # tags of csrc/noise.h

_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


OWN_NUMBERS = 6  # at most, of a rule


def tile(dtype: torch.dtype, moments: bool = False, states: int = 0) -> tuple[int, int]:
    """The elements of a program's tile, and how many neighbours of them a thread holds."""
    if dtype == torch.float64 or moments or states:
        return 4 * 32 * WARPS, 4
    return 8 * 32 * WARPS, 8 if dtype.itemsize == 2 else 4


def registers(dtype: torch.dtype, moments: bool, rule: str) -> int:
    """Registers of a thread, at most."""
    return REGISTERS[dtype] + 32 * (rule in ROOTS) + 40 * (rule != "sgld" and moments)


def _real(dtype: torch.dtype) -> tl.dtype:
    """The type of the arithmetic."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def _tile_at(address, position, DTYPE: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Pointers to a tile of the tensor whose position 0 has this address."""
    pointer = address.to(tl.pointer_type(DTYPE)) + position
    if not MASKED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + tl.arange(0, SIZE)


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(pointers, values, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, values, mask=inside)
    else:
        tl.store(pointers, values)


@triton.jit
def _magnitude(x):
    """|x| as an integer that orders as it does: its bits, the upper 32 of float64."""
    if x.dtype == tl.float64:
        bits = (x.to(tl.int64, bitcast=True) >> 32).to(tl.int32)
    else:
        bits = x.to(tl.int32, bitcast=True)
    return bits & 0x7FFFFFFF


@triton.jit
def _infinity(REAL: tl.constexpr):
    """The smallest `_magnitude` of what is not finite."""
    return 0x7FF00000 if REAL == tl.float64 else 0x7F800000


@triton.jit
def _number(pointer, position: tl.constexpr, x, REAL: tl.constexpr):
    """A scalar of the step, rounded once to the type of the arithmetic: from the device, or the argument."""
    if pointer is not None:
        return tl.load(pointer + position)
    elif INTERPRETED:
        return tl.full((1,), x, tl.float64).to(REAL)
    else:
        return x.to(REAL)


@triton.jit
def _step_tile(
    theta_at, gradient_at, center_at, mean_at, m2_at, master_at, first_at, second_at, position, low, high, worst, noise_table,
    minus_lr, decay, sigma, inverse_count, n0, n1, n2, n3, n4, n5, first_block, seed, chain, step, parameter,
    DTYPE: tl.constexpr, REAL: tl.constexpr, RULE: tl.constexpr, STATES: tl.constexpr, PRIOR: tl.constexpr,
    NOISE: tl.constexpr, MOMENTS: tl.constexpr, MASTER: tl.constexpr, CHECK: tl.constexpr, WIDTH: tl.constexpr,
    SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The step of the positions position + [low, high) of a tensor: all of the tile unless MASKED. Returns `worst`, the
    largest magnitude of a gradient that each thread has seen."""
    inside = (tl.arange(0, SIZE) >= low) & (tl.arange(0, SIZE) < high)
    theta = _tile_at(theta_at, position, DTYPE, SIZE, MASKED)
    raw = _load(_tile_at(gradient_at, position, DTYPE, SIZE, MASKED), inside, MASKED)
    if MASTER:
        master = _tile_at(master_at, position, tl.float32, SIZE, MASKED)
        old = _load(master, inside, MASKED)
    else:
        old = widen(_load(theta, inside, MASKED), REAL)
    gradient = widen(raw, REAL)
    magnitude = _magnitude(gradient)
    if PRIOR == CENTRED:
        center = widen(_load(_tile_at(center_at, position, DTYPE, SIZE, MASKED), inside, MASKED), REAL)
        gradient = fma(decay, old - center, gradient)
    elif PRIOR == CENTRED_AT_ZERO:
        gradient = fma(decay, old, gradient)
    first, second, noise = old, old, old
    if STATES > 0:
        first_pointers = _tile_at(first_at, position, REAL, SIZE, MASKED)
        first = _load(first_pointers, inside, MASKED)
    if STATES > 1:
        second_pointers = _tile_at(second_at, position, REAL, SIZE, MASKED)
        second = _load(second_pointers, inside, MASKED)
    if NOISE:
        block = blocks_of(first_block + tl.cast(position // 4, tl.uint64), SIZE, WIDTH)
        noise = normals_of(block, seed, step, chain, parameter, LANGEVIN, SIZE).to(REAL)
    if noise_table is not None:
        new = fma(minus_lr, gradient, old)
        new = fma(tl.load(noise_table + exponent_field(new, DTYPE)), noise, new)
        new_first, new_second = first, second
    else:
        new, new_first, new_second = advance(
            old, first, second, gradient, noise, minus_lr, sigma, n0, n1, n2, n3, n4, n5, RULE, NOISE
        )
    if CHECK:
        finite = magnitude < _infinity(REAL)
        new = tl.where(finite, new, old)
        if STATES > 0:
            new_first = tl.where(finite, new_first, first)
        if STATES > 1:
            new_second = tl.where(finite, new_second, second)
        worst = tl.maximum(worst, tl.max(tl.reshape(magnitude, (SIZE // WIDTH, WIDTH)), axis=1))
    if noise_table is not None:
        random = element_words_of(block, seed, step, chain, parameter, STOCHASTIC_ROUNDING, SIZE) >> 16
        stored = round_stochastically(new, random, DTYPE)
    else:
        stored = narrow(new, DTYPE)
    if MASTER:
        _store(master, new, inside, MASKED)
    else:
        new = widen(stored, REAL)
    _store(theta, stored, inside, MASKED)
    if STATES > 0:
        _store(first_pointers, new_first, inside, MASKED)
    if STATES > 1:
        _store(second_pointers, new_second, inside, MASKED)
    if MOMENTS:
        mean_pointers = _tile_at(mean_at, position, REAL, SIZE, MASKED)
        m2_pointers = _tile_at(m2_at, position, REAL, SIZE, MASKED)
        mean, m2 = _load(mean_pointers, inside, MASKED), _load(m2_pointers, inside, MASKED)
        delta = new - mean
        mean = fma(delta, inverse_count, mean)
        _store(mean_pointers, mean, inside, MASKED)
        _store(m2_pointers, fma(delta, new - mean, m2), inside, MASKED)
    return worst


# One compilation serves every table: alignment is asked of the addresses in it.
_POINTERS = ["rows", "labels", "chunks", "nonfinite", "noise_table", "scalars", "clock"]


_UNSPECIALISED = ["size", "seed", "chain", "step", "scalars_stride", "table_stride"]


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_POINTERS)
def langevin_kernel(
    rows, labels, chunks, size, nonfinite, noise_table, scalars, clock,
    lr: tl.float64, decay: tl.float64, sigma: tl.float64, inverse_count: tl.float64,
    n0: tl.float64, n1: tl.float64, n2: tl.float64, n3: tl.float64, n4: tl.float64, n5: tl.float64,
    seed: tl.uint64, chain, step: tl.int64, scalars_stride, table_stride,
    DTYPE: tl.constexpr, REAL: tl.constexpr, RULE: tl.constexpr, STATES: tl.constexpr, OWN: tl.constexpr,
    PRIOR: tl.constexpr, NOISE: tl.constexpr, MOMENTS: tl.constexpr, MASTER: tl.constexpr, WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """One program per chunk. WIDTH: neighbouring elements that a thread holds, 4 or 8; SIZE: elements of a tile. The strides
    are from one chain's scalars and noise table to the next's, 0 where one serves all."""
    program = tl.program_id(0)
    number = tl.load(chunks + 2 * program)
    label = labels + 4 * number
    parameter, own_chain, tensor = tl.load(label), tl.load(label + 1), tl.load(label + 2)
    row = rows + number * 10
    count, first_element = tl.load(row + 8), tl.load(row + 9)
    phase = first_element & 3
    # from here on a tensor's positions count from the start of its first noise block
    theta_at = tl.load(row) - phase * (DTYPE.primitive_bitwidth // 8)
    gradient_at = tl.load(row + 1) - phase * (DTYPE.primitive_bitwidth // 8)
    center_at, mean_at, m2_at, master_at = theta_at, theta_at, theta_at, theta_at
    first_at, second_at = theta_at, theta_at
    if PRIOR == CENTRED:
        center_at = tl.load(row + 2) - phase * (DTYPE.primitive_bitwidth // 8)
    if MOMENTS:
        mean_at = tl.load(row + 3) - phase * (REAL.primitive_bitwidth // 8)
        m2_at = tl.load(row + 4) - phase * (REAL.primitive_bitwidth // 8)
    if MASTER:
        master_at = tl.load(row + 5) - phase * 4
    if STATES > 0:
        first_at = tl.load(row + 6) - phase * (REAL.primitive_bitwidth // 8)
    if STATES > 1:
        second_at = tl.load(row + 7) - phase * (REAL.primitive_bitwidth // 8)
    addresses = theta_at | gradient_at | center_at | mean_at | m2_at | master_at | first_at | second_at
    begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * size
    end = tl.minimum(begin + size, count + phase)
    whole = begin
    if ((addresses & 15) == 0) & (begin >= phase):
        whole = begin + (end - begin) // SIZE * SIZE

    if scalars is not None:
        scalars += own_chain * scalars_stride
    if noise_table is not None:
        noise_table += own_chain * table_stride
    minus_lr = -_number(scalars, 0, lr, REAL)
    decay = _number(scalars, 1, decay, REAL)
    sigma = _number(scalars, 2, sigma, REAL)
    inverse_count = _number(None, 0, inverse_count, REAL)
    if OWN > 0:  # a rule has no more scalars than its own
        n0, n1 = _number(scalars, 3, n0, REAL), _number(scalars, 4, n1, REAL)
    if OWN > 2:
        n2 = _number(scalars, 5, n2, REAL)
    if OWN > 3:
        n3, n4, n5 = _number(scalars, 6, n3, REAL), _number(scalars, 7, n4, REAL), _number(scalars, 8, n5, REAL)
    chain += own_chain
    if clock is not None:
        step = tl.load(clock)
    first_block = (first_element >> 2).to(tl.uint64)
    worst = tl.zeros((SIZE // WIDTH,), tl.int32)
    for position in range(begin, whole, SIZE):
        worst = _step_tile(
            theta_at, gradient_at, center_at, mean_at, m2_at, master_at, first_at, second_at, position, 0, SIZE,
            worst, noise_table,
            minus_lr, decay, sigma, inverse_count, n0, n1, n2, n3, n4, n5, first_block, seed, chain, step, parameter,
            DTYPE, REAL, RULE, STATES, PRIOR, NOISE, MOMENTS, MASTER, nonfinite is not None, WIDTH, SIZE, False,
        )  # fmt: skip
    for position in range(whole, end, SIZE):
        worst = _step_tile(
            theta_at, gradient_at, center_at, mean_at, m2_at, master_at, first_at, second_at, position,
            (phase - position).to(tl.int32), (end - position).to(tl.int32), worst, noise_table,
            minus_lr, decay, sigma, inverse_count, n0, n1, n2, n3, n4, n5, first_block, seed, chain, step, parameter,
            DTYPE, REAL, RULE, STATES, PRIOR, NOISE, MOMENTS, MASTER, nonfinite is not None, WIDTH, SIZE, True,
        )  # fmt: skip
    if nonfinite is not None:  # one store of one byte by whoever found something: no atomics
        tl.store(nonfinite + tensor + tl.zeros((SIZE // WIDTH,), tl.int32), 1, mask=worst >= _infinity(REAL))


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=_POINTERS[:4])
def nonfinite_kernel(rows, chunks, size, nonfinite, DTYPE: tl.constexpr, REAL: tl.constexpr, SIZE: tl.constexpr):
    """Set nonfinite[tensor] where column 0 of its row leads to a NaN or an infinity."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    row = rows + tensor * 10
    address, count = tl.load(row), tl.load(row + 8)
    begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * size
    end = tl.minimum(begin + size, count)
    whole = begin
    if (address & 15) == 0:
        whole = begin + (end - begin) // SIZE * SIZE
    worst = tl.zeros((SIZE,), tl.int32)
    for position in range(begin, whole, SIZE):
        values = tl.load(_tile_at(address, position, DTYPE, SIZE, False))
        worst = tl.maximum(worst, _magnitude(widen(values, REAL)))
    for position in range(whole, end, SIZE):
        inside = tl.arange(0, SIZE) < (end - position)
        values = tl.load(_tile_at(address, position, DTYPE, SIZE, True), mask=inside, other=0.0)
        worst = tl.maximum(worst, _magnitude(widen(values, REAL)))
    tl.store(nonfinite + tensor + tl.zeros((SIZE,), tl.int32), 1, mask=worst >= _infinity(REAL))


def langevin_step_(
    table: Table,
    dtype: torch.dtype,
    *,
    centered: bool,
    moments: bool,
    master: bool,
    nonfinite: Tensor | None,
    noise_table: Tensor | None,
    scalars: Tensor | None,
    clock: Tensor | None,
    lr: float,
    decay: float,
    sigma: float,
    draws: int,
    seed: int,
    chain: int,
    step: int,
    rule: str,
    states: int,
    own: Sequence[float],
) -> None:
    """One step of the table's tensors; the arguments are those of `bkd_fast.ops.langevin.LangevinStep`, and how many
    arrays of state the rule keeps."""
    chunks = table.chunks.shape[0]
    if not chunks:
        return
    size, width = tile(dtype, moments, states)
    numbers = [*own, *[0.0] * (OWN_NUMBERS - len(own))]
    langevin_kernel[(chunks,)](
        table.rows, table.labels, table.chunks, table.size,
        None if nonfinite is None else nonfinite.view(torch.uint8), noise_table, scalars, clock,
        lr, decay, sigma, 1.0 / draws if moments else 0.0, *numbers, seed, chain, step,
        chain_stride(scalars), chain_stride(noise_table),
        DTYPE=_TYPES[dtype], REAL=_real(dtype), RULE=NUMBERS[rule].value, STATES=states, OWN=len(own),
        PRIOR=(FLAT if decay == 0 else CENTRED if centered else CENTRED_AT_ZERO).value,
        NOISE=sigma != 0 or noise_table is not None, MOMENTS=moments, MASTER=master,
        WIDTH=width, SIZE=size, num_warps=WARPS, num_stages=1, maxnreg=registers(dtype, moments, rule), enable_fp_fusion=False,
    )  # fmt: skip


def find_nonfinite(table: Table, dtype: torch.dtype, found: Tensor) -> None:
    """Set found[i] (bool, on the table's device) where tensor i of `dtype` holds a NaN or an infinity."""
    chunks = table.chunks.shape[0]
    if chunks:
        nonfinite_kernel[(chunks,)](
            table.rows, table.chunks, table.size, found.view(torch.uint8),
            DTYPE=_TYPES[dtype], REAL=_real(dtype), SIZE=tile(dtype)[0], num_warps=WARPS,
        )  # fmt: skip
