"""Operation C in Triton: W draws of logits for a batch of rows go into the posterior predictive's state.

    measure_rows  softmax statistics of every draw and row.
    update_tiles  one program per tile of 64 cells: moments, then codes into the counters by comparing them with every slot: about
                  630 instructions per cell and draw. For machines without CuPy: csrc/cuda/predictive.cu, which increments
                  counters in shared memory, needs 89. Without a histogram, moments only.
    pick_codes    the codes of chosen classes, for sketches of those alone.
    finish_rows   entropies, divergences and counts of every row.

`update_sketch` adds such codes to the tiles of any sketch.

The arithmetic is csrc/predictive.h's; sums over classes run in another order than on the CPU, so a code may differ by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_CELLS = tl.constexpr(64)
PICKS_AT_ONCE = 128  # pairs of a row and a picked class
SMALLEST_REFERENCE = tl.constexpr(2.0**-126)

_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440e-4)
_EXP_LOWEST = tl.constexpr(-87.0)  # below, exp is taken as 0
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: rounds to an integer, which the low bits then hold
_SERIES_RADIUS = tl.constexpr(0.25)

# what the statistics, float32 (draws, rows, 8), hold of a draw and row
_MAXIMUM = tl.constexpr(0)
_TOTAL = tl.constexpr(1)
_REST = tl.constexpr(2)
_INVERSE_TOTAL = tl.constexpr(3)
_LOG_TOTAL = tl.constexpr(4)
_ENTROPY = tl.constexpr(5)  # NaN where the row is invalid
_FIELDS = tl.constexpr(8)


# a last batch, or one more draw, is no reason to compile anew
_for_any_number_of_rows = triton.jit(do_not_specialize=["draws", "size", "num_rows", "search", "picks"])


@triton.jit
def _exp_nonpositive(x):
    """exp(x), and x not below -87; NaN stays NaN (csrc/explog.h)."""
    argument = tl.where(x < _EXP_LOWEST, _EXP_LOWEST, x)
    shifted = tl.fma(argument, 1.44269504, _ROUND)
    octaves = shifted - _ROUND
    f = tl.fma(-octaves, _LN2_HIGH, argument)
    f = tl.fma(-octaves, _LN2_LOW, f)
    square = f * f
    even = tl.fma(tl.fma(square, 1.3981999507e-3, 4.1665795894e-2), square, 5.0000001201e-1)
    odd = tl.fma(tl.fma(square, 1.9875691500e-4, 8.3334519073e-3), square, 1.6666665459e-1)
    y = tl.fma(tl.fma(odd, f, even), square, f) + 1.0
    scaled = (y.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)
    return tl.where(x < _EXP_LOWEST, 0.0, scaled), argument


@triton.jit
def _log_positive(x):
    """ln x; about -88 below the smallest normal number (csrc/explog.h)."""
    i = x.to(tl.int32, bitcast=True)
    octaves = (i - 0x3F3504F3) >> 23
    f = (i - (octaves << 23)).to(tl.float32, bitcast=True) - 1.0
    k = octaves.to(tl.float32)
    z = f * f
    even = tl.fma(z, 7.0376836292e-2, 1.1676998740e-1)
    odd = tl.fma(z, -1.1514610310e-1, -1.2420140846e-1)
    even = tl.fma(even, z, 1.4249322787e-1)
    odd = tl.fma(odd, z, -1.6668057665e-1)
    even = tl.fma(even, z, 2.0000714765e-1)
    odd = tl.fma(odd, z, -2.4999993993e-1)
    even = tl.fma(even, z, 3.3333331174e-1)
    y = tl.fma(odd, f, even) * (f * z)
    y = tl.fma(k, _LN2_LOW, y)
    y = tl.fma(z, -0.5, y)
    return tl.fma(k, _LN2_HIGH, f + y)


@_for_any_number_of_rows
def measure_rows(logits, draw_stride, batch, statistics, size, classes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (blocks of ROWS rows, draws). Two reads of the logits, the second from the cache."""
    draw = tl.program_id(1)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = place < size
    row = logits + draw.to(tl.int64) * draw_stride + tl.load(batch + place, mask=here, other=0) * classes
    # lanes keep their own sums until the end
    most = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
    for begin in range(0, classes, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        z = tl.load(row[:, None] + c[None, :], mask=here[:, None] & (c < classes)[None, :], other=float("-inf"))
        most = tl.maximum(most, z)
    maximum = tl.max(most, 1)
    rests = tl.zeros([ROWS, BLOCK], tl.float32)
    weights = tl.zeros([ROWS, BLOCK], tl.float32)
    tops = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, classes, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        z = tl.load(row[:, None] + c[None, :], mask=here[:, None] & (c < classes)[None, :], other=float("-inf"))
        difference = z - maximum[:, None]
        e, argument = _exp_nonpositive(difference)
        top = difference == 0.0
        rests += tl.where(top, 0.0, e)
        weights = tl.fma(e, argument, weights)
        tops += tl.where(top, 1.0, 0.0)
    rest = tl.sum(rests, 1)
    weighted = tl.sum(weights, 1)
    ties = tl.sum(tops, 1)
    # a row with NaN or +inf, or all of -inf, has a difference that is NaN, and so its weighted sum
    total = rest + ties
    inverse = 1.0 / total
    rest = rest + (ties - 1.0)
    # log(1 + rest) with what the sum lost: entropies of confident rows are far below the sum's rounding
    log_total = tl.fma(rest - (total - 1.0), inverse, _log_positive(total))
    out = statistics + (draw.to(tl.int64) * size + place) * _FIELDS
    tl.store(out + _MAXIMUM, maximum, mask=here)
    tl.store(out + _TOTAL, total, mask=here)
    tl.store(out + _REST, rest, mask=here)
    tl.store(out + _INVERSE_TOTAL, inverse, mask=here)
    tl.store(out + _LOG_TOTAL, log_total, mask=here)
    tl.store(out + _ENTROPY, tl.fma(-weighted, inverse, log_total), mask=here)


@triton.jit
def _level_of(least, most, LOG2_BINS: tl.constexpr):
    """The least e with (most >> e) - (least >> e) < BINS (csrc/histogram.h)."""
    bit_length = ((most - least).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    guess = tl.maximum(bit_length - LOG2_BINS, 0)
    return guess + tl.where((most >> guess) - (least >> guess) > (1 << LOG2_BINS) - 1, 1, 0)


@triton.jit
def _code_of(logit):
    """rint(1024 logit), saturated to 16 bits."""
    clamped = tl.minimum(tl.maximum(logit * 1024.0, -32768.0), 32767.0)
    return ((clamped + _ROUND).to(tl.int32, bitcast=True) << 16) >> 16


@triton.jit
def _draw_of(z, statistics, here):
    """Of cells in one draw: whether it counts, logit(p), p and log p (csrc/predictive.h)."""
    valid = here & (tl.load(statistics + _ENTROPY, mask=here, other=float("nan")) > float("-inf"))
    maximum = tl.load(statistics + _MAXIMUM, mask=valid, other=0.0)
    total = tl.load(statistics + _TOTAL, mask=valid, other=2.0)
    rest = tl.load(statistics + _REST, mask=valid, other=1.0)
    inverse_total = tl.load(statistics + _INVERSE_TOTAL, mask=valid, other=0.5)
    log_total = tl.load(statistics + _LOG_TOTAL, mask=valid, other=0.0)
    difference = tl.where(valid, z - maximum, 0.0)
    e, argument = _exp_nonpositive(difference)
    others = tl.where(difference == 0.0, rest, total - e)  # never total - 1, which would cancel
    return valid, difference - _log_positive(others), e * inverse_total, argument - log_total


@triton.jit
def _divergence_term(p, log_p, reference, inverse_reference, log_reference):
    """r ((1 + x) log(1 + x) - x) / r, x = p / r - 1; near x = 0 a polynomial (csrc/predictive.h)."""
    x = (p - reference) * inverse_reference
    square = x * x
    even = tl.fma(tl.fma(square, 0.03508401, 0.083291784), square, 0.5000001)
    odd = tl.fma(tl.fma(square, -0.02517435, -0.049967587), square, -0.16666678)
    log_ratio = log_p - log_reference
    plain = tl.fma(x, log_ratio, log_ratio) - x
    return tl.where(square < _SERIES_RADIUS * _SERIES_RADIUS, square * tl.fma(odd, x, even), plain)


@_for_any_number_of_rows
def pick_codes(
    logits,
    draw_stride,
    rows,
    batch,
    size,
    statistics,
    picked,
    picks,
    codes,
    valid,
    num_rows,
    classes,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of BLOCK pairs of a row and a pick, draws)."""
    draw = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = pair // picks
    pick = pair - place * picks
    row = tl.load(rows + place, mask=place < size, other=num_rows)
    here = row < num_rows
    c = tl.load(picked + row * picks + pick, mask=here, other=0)
    z = tl.load(
        logits + draw * draw_stride + tl.load(batch + place, mask=here, other=0) * classes + c, mask=here, other=0.0
    )
    counted, logit, _, _ = _draw_of(z, statistics + (draw * size + place) * _FIELDS, here)
    at = draw * size + place
    tl.store(codes + at * picks + pick, _code_of(logit).to(tl.int16), mask=counted)
    tl.store(valid + at, counted.to(tl.int8), mask=(place < size) & (pick == 0))


@triton.jit
def _place_cells(rows, first, size, tile, row, num_rows, row_cells, search):
    """The 64 cells of a tile: whose place in the batch, which cell of their row they are, and whether they are in it.

    first: the place of the first row of the batch in the tile; rows ascend, so the nth is at most n places further on. Padding
    may seem to be of a row that is left out.
    """
    offset = (tile * TILE_CELLS - row * row_cells).to(tl.int32) + tl.arange(0, TILE_CELLS)
    nth = tl.maximum(offset, 0) // row_cells
    wanted = row + nth
    place = tl.minimum(first + nth, size - 1)
    for _ in range(search):
        place = tl.where((place > first) & (tl.load(rows + place) > wanted), place - 1, place)
    here = (offset >= 0) & (wanted < num_rows) & (tl.load(rows + place) == wanted)
    return place, wanted, offset - nth * row_cells, here


@triton.jit
def _owned_tile(rows, num_rows, row_cells):
    """The tile of this program, the place of its first row in the batch, and whether it owns it: a tile's first row does."""
    per_row = (row_cells + TILE_CELLS - 2) // TILE_CELLS + 1
    first = (tl.program_id(0) // per_row).to(tl.int64)
    row = tl.load(rows + first)
    tile = row * row_cells // TILE_CELLS + tl.program_id(0) % per_row
    before = tl.load(rows + first - 1, mask=first > 0, other=-1)
    owned = (
        (row < num_rows) & (tile * TILE_CELLS < (row + 1) * row_cells) & ((before + 1) * row_cells <= tile * TILE_CELLS)
    )
    return first, row, tile, owned


@triton.jit
def _at_new_level(column, count, pooled, changed, old_least, old_most, least, most, LOG2_BINS: tl.constexpr):
    """The counters of 64 cells at the level that least..most ask for, (BINS, 64), and that level.

    A code kept so far and a bin of a finer level alike add a value to one slot of their cell.
    """
    BINS: tl.constexpr = 1 << LOG2_BINS
    slots = tl.arange(0, BINS)
    counting = pooled > BINS
    counted = count > BINS
    level = tl.where(counting, _level_of(least, most, LOG2_BINS), 0)
    old_level = tl.where(counted, _level_of(old_least, old_most, LOG2_BINS), 0)
    rebuilt = changed & counting & ((level != old_level) | (count <= BINS))
    kept = tl.load(column[None, :] + slots[:, None] * TILE_CELLS).to(tl.int32)
    held = tl.where(rebuilt[None, :], 0, kept)
    if tl.max(rebuilt.to(tl.int32), 0) > 0:
        first_bin = old_least >> old_level
        for s in range(BINS):
            value = tl.load(column + s * TILE_CELLS).to(tl.int32)
            bin_slot = ((first_bin + ((s - first_bin) & (BINS - 1))) >> (level - old_level)) & (BINS - 1)
            code_slot = (((value << 16) >> 16) >> level) & (BINS - 1)
            slot = tl.where(counted, bin_slot, code_slot)
            amount = tl.where(rebuilt, tl.where(counted, value, (s < count).to(tl.int32)), 0)
            held += tl.where(slots[:, None] == slot[None, :], amount[None, :], 0)
    return held, level


@triton.jit
def _with_code(held, code, valid, counting, level, position, LOG2_BINS: tl.constexpr):
    """The counters with one more draw of each cell: counted, or kept in the slot `position`."""
    BINS: tl.constexpr = 1 << LOG2_BINS
    slot = tl.where(counting, (code >> level) & (BINS - 1), position)
    amount = tl.where(valid, tl.where(counting, 1, code & 0xFFFF), 0)
    return held + tl.where(tl.arange(0, BINS)[:, None] == slot[None, :], amount[None, :], 0)


@triton.jit
def _store_counters(column, held, changed, LOG2_BINS: tl.constexpr):
    slots = tl.arange(0, 1 << LOG2_BINS)
    tl.store(column[None, :] + slots[:, None] * TILE_CELLS, held.to(tl.uint16), mask=changed[None, :])


@_for_any_number_of_rows
def update_tiles(
    logits, draw_stride, draws, rows, batch, size, statistics, divergences, counters, minimum, maximum, mean, m2, reference,
    counts, num_rows, classes, search, LOG2_BINS: tl.constexpr, HISTOGRAM: tl.constexpr,
):  # fmt: skip
    """Grid: for each of `size` rows as many programs as it may touch tiles; a tile's first row in the batch owns it.

    search: the most rows that a tile may touch, less one.
    """
    BINS: tl.constexpr = 1 << LOG2_BINS
    first, row, tile, owned = _owned_tile(rows, num_rows, classes)
    if owned:
        cells = tl.arange(0, TILE_CELLS)
        place, wanted, c, here = _place_cells(rows, first, size, tile, row, num_rows, classes, search)
        at = tile * TILE_CELLS + cells
        z = logits + tl.load(batch + place) * classes + c
        count = tl.load(counts + wanted, mask=here, other=0)
        is_new = count == 0

        # moments of the window about `shift`: the mean so far, or the first draw
        shift = tl.load(mean + at)
        sums = tl.zeros([TILE_CELLS], tl.float32)
        squares = tl.zeros([TILE_CELLS], tl.float32)
        if HISTOGRAM:
            old_least = tl.load(minimum + at).to(tl.int32)
            old_most = tl.load(maximum + at).to(tl.int32)
            least = old_least
            most = old_most
        taken = tl.zeros([TILE_CELLS], tl.int32)
        draw = z
        of_draw = statistics + place * _FIELDS
        for _ in range(draws):
            valid, logit, p, log_p = _draw_of(tl.load(draw, mask=here, other=0.0), of_draw, here)
            draw += draw_stride
            of_draw += size * _FIELDS
            if HISTOGRAM:
                code = _code_of(logit)
                least = tl.where(valid, tl.minimum(least, code), least)
                most = tl.where(valid, tl.maximum(most, code), most)
            shift = tl.where(valid & is_new & (taken == 0), p, shift)
            deviation = tl.where(valid, p - shift, 0.0)
            sums += deviation
            squares = tl.fma(deviation, deviation, squares)
            taken += valid.to(tl.int32)
        changed = taken > 0
        pooled = count + taken
        step = sums * tl.where(changed, 1.0 / tl.maximum(pooled, 1).to(tl.float32), 0.0)
        tl.store(mean + at, shift + step, mask=changed)
        tl.store(m2 + at, tl.load(m2 + at) + tl.fma(-sums, step, squares), mask=changed)
        r = tl.where(is_new, tl.maximum(shift + step, SMALLEST_REFERENCE), tl.load(reference + at))
        tl.store(reference + at, r, mask=changed & is_new)
        r = tl.where(changed, r, 1.0)
        inverse_r = 1.0 / r
        log_r = _log_positive(r)

        if HISTOGRAM:
            tl.store(minimum + at, least.to(tl.int16), mask=changed)
            tl.store(maximum + at, most.to(tl.int16), mask=changed)
            column = counters + tile * (BINS * TILE_CELLS) + cells
            held, level = _at_new_level(column, count, pooled, changed, old_least, old_most, least, most, LOG2_BINS)
        divergence = tl.zeros([TILE_CELLS], tl.float32)
        position = count
        draw = z
        of_draw = statistics + place * _FIELDS
        for _ in range(draws):
            valid, logit, p, log_p = _draw_of(tl.load(draw, mask=here, other=0.0), of_draw, here)
            draw += draw_stride
            of_draw += size * _FIELDS
            if HISTOGRAM:
                held = _with_code(held, _code_of(logit), valid, pooled > BINS, level, position, LOG2_BINS)
            position += valid.to(tl.int32)
            divergence += tl.where(valid, _divergence_term(p, log_p, r, inverse_r, log_r), 0.0)
        if HISTOGRAM:
            _store_counters(column, held, changed, LOG2_BINS)
        tl.store(divergences + place * classes + c, divergence * r, mask=here)


@_for_any_number_of_rows
def update_sketch(
    codes, valid, draws, rows, size, counters, minimum, maximum, counts, num_rows, row_cells, search, LOG2_BINS: tl.constexpr,
):  # fmt: skip
    """Grid as that of `update_tiles`. codes: (draws, size, row_cells); valid: (draws, size). Counts stay as they are."""
    BINS: tl.constexpr = 1 << LOG2_BINS
    first, row, tile, owned = _owned_tile(rows, num_rows, row_cells)
    if owned:
        cells = tl.arange(0, TILE_CELLS)
        place, wanted, c, here = _place_cells(rows, first, size, tile, row, num_rows, row_cells, search)
        at = tile * TILE_CELLS + cells
        count = tl.load(counts + wanted, mask=here, other=0)
        old_least = tl.load(minimum + at).to(tl.int32)
        old_most = tl.load(maximum + at).to(tl.int32)
        least = old_least
        most = old_most
        taken = tl.zeros([TILE_CELLS], tl.int32)
        draw = place  # among all draws of all rows
        for _ in range(draws):
            counted = here & (tl.load(valid + draw, mask=here, other=0) != 0)
            code = tl.load(codes + draw * row_cells + c, mask=counted, other=0).to(tl.int32)
            draw += size
            least = tl.where(counted, tl.minimum(least, code), least)
            most = tl.where(counted, tl.maximum(most, code), most)
            taken += counted.to(tl.int32)
        changed = taken > 0
        pooled = count + taken
        tl.store(minimum + at, least.to(tl.int16), mask=changed)
        tl.store(maximum + at, most.to(tl.int16), mask=changed)
        column = counters + tile * (BINS * TILE_CELLS) + cells
        held, level = _at_new_level(column, count, pooled, changed, old_least, old_most, least, most, LOG2_BINS)
        position = count
        draw = place
        for _ in range(draws):
            counted = here & (tl.load(valid + draw, mask=here, other=0) != 0)
            code = tl.load(codes + draw * row_cells + c, mask=counted, other=0).to(tl.int32)
            draw += size
            held = _with_code(held, code, counted, pooled > BINS, level, position, LOG2_BINS)
            position += counted.to(tl.int32)
        _store_counters(column, held, changed, LOG2_BINS)


@_for_any_number_of_rows
def finish_rows(
    draws, rows, size, statistics, divergences, counts, invalid, entropy, divergence, num_rows, classes, DRAWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: size. DRAWS and BLOCK: powers of two, DRAWS not below `draws`."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place)
    if row < num_rows:
        w = tl.arange(0, DRAWS).to(tl.int64)
        e = tl.load(statistics + (w * size + place) * _FIELDS + _ENTROPY, mask=w < draws, other=float("nan"))
        valid = e > float("-inf")
        taken = tl.sum(valid.to(tl.int32), 0)
        tl.store(entropy + row, tl.load(entropy + row) + tl.sum(tl.where(valid, e, 0.0).to(tl.float64), 0))
        sums = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, classes, BLOCK):
            c = begin + tl.arange(0, BLOCK)
            sums += tl.load(divergences + place * classes + c, mask=c < classes, other=0.0).to(tl.float64)
        tl.store(divergence + row, tl.load(divergence + row) + tl.where(taken > 0, tl.sum(sums, 0), 0.0))
        tl.store(counts + row, tl.load(counts + row) + taken)
        tl.store(invalid + row, tl.load(invalid + row) + draws - taken)


def predictive_update_(
    logits: Tensor,
    rows: Tensor,
    batch: Tensor,
    counters: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    counts: Tensor,
    mean: Tensor,
    m2: Tensor,
    reference: Tensor,
    invalid: Tensor,
    entropy: Tensor,
    divergence: Tensor,
    picked: Tensor,
    codes: Tensor,
    valid: Tensor,
) -> None:
    """Add a window of draws to the state, in place, and write the codes of picked classes; nothing waits for the device.

    Args:
        logits: float32 (W, B, C), contiguous but for its first stride.
        rows: int64 (size,), ascending; those that are not below the number of rows of `counts` are left out.
        batch: int64 (size,), the batch row of each.
        counters ...: the arrays of bkd_fast.ops.predictive.PredictiveState; no counters: no histogram.
        picked: int32 (rows of the state, picks).
        codes, valid: int16 (W, size, picks) and bool (W, size), to be written where there are picks.
    """
    draws, _, classes = logits.shape
    size, num_rows, bins = rows.numel(), counts.numel(), counters.shape[1]
    statistics = torch.empty(draws * size * _FIELDS.value, dtype=torch.float32, device=logits.device)
    divergences = torch.empty(size * classes, dtype=torch.float32, device=logits.device)
    stride = logits.stride(0)
    block = min(triton.next_power_of_2(classes), 1024)
    rows_at_once = max(1, min(32, 1024 // block))
    measure_rows[(triton.cdiv(size, rows_at_once), draws)](
        logits,
        stride,
        batch,
        statistics,
        size,
        classes,
        ROWS=rows_at_once,
        BLOCK=block,
        enable_fp_fusion=False,
    )
    tiles_per_row = (classes + 64 - 2) // 64 + 1
    update_tiles[(size * tiles_per_row,)](
        logits, stride, draws, rows, batch, size, statistics, divergences, counters, minimum, maximum, mean, m2, reference,
        counts, num_rows, classes, 64 // classes + 1, LOG2_BINS=bins.bit_length() - 1, HISTOGRAM=len(counters) > 0,
        num_warps=bins // 16 if len(counters) else 2, enable_fp_fusion=False,
    )  # fmt: skip
    picks = picked.shape[1]
    if picks:
        pick_codes[(triton.cdiv(size * picks, PICKS_AT_ONCE), draws)](
            logits, stride, rows, batch, size, statistics, picked, picks, codes, valid.view(torch.int8), num_rows, classes,
            BLOCK=PICKS_AT_ONCE, enable_fp_fusion=False,
        )  # fmt: skip
    finish_rows[(size,)](
        draws, rows, size, statistics, divergences, counts, invalid, entropy, divergence, num_rows, classes,
        DRAWS=triton.next_power_of_2(draws), BLOCK=block, enable_fp_fusion=False,
    )  # fmt: skip


def sketch_update_(
    codes: Tensor,
    valid: Tensor | None,
    rows: Tensor,
    counters: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    counts: Tensor,
    row_cells: int,
) -> None:
    """Add a window of codes to tiles, in place, counts included; nothing waits for the device.

    Args:
        codes: int16 (W, size, row_cells); valid: bool (W, size), None: all.
        rows: int64 (size,), ascending; those that are not below the number of rows are left out.
        counters, minimum, maximum, counts: the arrays of bkd_fast.ops.sketch.Tiles.
    """
    draws, size = codes.shape[:2]
    num_rows, bins = counts.numel(), counters.shape[1]
    if valid is None:
        valid = torch.ones(draws, size, dtype=torch.bool, device=codes.device)
    tiles_per_row = (row_cells + 64 - 2) // 64 + 1
    update_sketch[(size * tiles_per_row,)](
        codes, valid.view(torch.int8), draws, rows, size, counters, minimum, maximum, counts, num_rows, row_cells,
        64 // row_cells + 1, LOG2_BINS=bins.bit_length() - 1, num_warps=bins // 16, enable_fp_fusion=False,
    )  # fmt: skip
    add_counts_(counts, rows, valid)


def add_counts_(counts: Tensor, rows: Tensor, valid: Tensor) -> None:
    """Bring the counts of rows up to date, those that are left out excepted."""
    here = rows < counts.numel()
    counts.index_add_(0, torch.where(here, rows, 0), (valid & here).sum(0).to(counts.dtype))
