"""The dyadic logit histogram's tiles: adding codes, making them canonical, reading quantiles off them, merging them.

A cell is a stream of codes, int16; `CODES_PER_UNIT` codes are one unit (a logit) of what is streamed. While a row has
at most `bins` draws its cells keep their codes as they are; then they count them: a cell's level is the least e with
(max >> e) - (min >> e) < bins, and code x falls in slot (x >> e) & (bins - 1). See csrc/histogram.h.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops.registry import find

TILE_CELLS = 64
BINS = (64, 128)
CODES_PER_UNIT = 1024
CODE_MIN, CODE_MAX = -32768, 32767
MAX_COUNT = 65535  # what a counter holds
MAX_WINDOW = 64  # draws of one kernel call


class Tiles(NamedTuple):
    """Cells in rows of `row_cells` that share a count; cell = row * row_cells + position; padded to whole tiles."""

    counters: Tensor  # uint16 (tiles, bins, 64)
    minimum: Tensor  # int16 (tiles * 64,), CODE_MAX without draws
    maximum: Tensor  # int16 (tiles * 64,), CODE_MIN without draws
    counts: Tensor  # int32 (rows,)
    row_cells: int


class Histogram(NamedTuple):
    """Cells' draws by bins of codes first..last, ascending; a bin with last < first holds nothing. All int32."""

    counts: Tensor  # (rows, row_cells, bins)
    first: Tensor
    last: Tensor


class CodeQuantile(NamedTuple):
    """An order statistic of every cell, in codes: it lies in lower..upper; point interpolates."""

    lower: Tensor  # int32 (rows, row_cells)
    upper: Tensor  # int32 (rows, row_cells)
    point: Tensor  # float32 (rows, row_cells); NaN without draws


def empty_tiles(rows: int, row_cells: int, bins: int, device: torch.device | None = None) -> Tiles:
    """Tiles without draws.

    Raises:
        ValueError: `bins` is not 64 or 128.
    """
    if bins not in BINS:
        raise ValueError(f"bins = {bins!r}: must be one of {BINS}")
    tiles = -(-rows * row_cells // TILE_CELLS)
    return Tiles(
        torch.zeros(tiles, bins, TILE_CELLS, dtype=torch.uint16, device=device),
        torch.full((tiles * TILE_CELLS,), CODE_MAX, dtype=torch.int16, device=device),
        torch.full((tiles * TILE_CELLS,), CODE_MIN, dtype=torch.int16, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        row_cells,
    )


def tiles_on(tiles: Tiles, device: torch.device) -> Tiles:
    """The tiles on `device`: themselves where they are there, else a copy."""
    counters, minimum, maximum, counts, row_cells = tiles
    return Tiles(counters.to(device), minimum.to(device), maximum.to(device), counts.to(device), row_cells)


_LIBRARY = torch.library.Library("bkd_fast", "FRAGMENT")
_TILES = "Tensor minimum, Tensor maximum, Tensor counts, int row_cells"
_LIBRARY.define(
    "sketch_update_(Tensor(a!) counters, Tensor(b!) minimum, Tensor(c!) maximum, Tensor(d!) counts, int row_cells, "
    "Tensor codes, Tensor? valid, Tensor rows) -> ()"
)
_LIBRARY.define(f"sketch_histogram(Tensor counters, {_TILES}, int begin, int end, Tensor least, Tensor most) -> Tensor")
_LIBRARY.define("sketch_sort_(Tensor(a!) counters, Tensor counts, int row_cells) -> ()")
_LIBRARY.define(f"sketch_quantile(Tensor counters, {_TILES}, float q) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(f"sketch_deviance_quantile(Tensor counters, {_TILES}, Tensor level) -> Tensor")
_LIBRARY.define(
    "sketch_merge_(Tensor(a!) counters, Tensor(b!) minimum, Tensor(c!) maximum, Tensor counts, Tensor other_counters, "
    "Tensor other_minimum, Tensor other_maximum, Tensor other_counts, int row_cells) -> ()"
)


@torch.library.impl(_LIBRARY, "sketch_update_", "CompositeExplicitAutograd")
def _update(
    counters: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    counts: Tensor,
    row_cells: int,
    codes: Tensor,
    valid: Tensor | None,
    rows: Tensor,
) -> None:
    tiles = Tiles(counters, minimum, maximum, counts, row_cells)
    find("sketch_update_", counters.device)(tiles, codes, valid, rows)


@torch.library.register_fake("bkd_fast::sketch_update_", lib=_LIBRARY)
def _update_fake(
    counters: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    counts: Tensor,
    row_cells: int,
    codes: Tensor,
    valid: Tensor | None,
    rows: Tensor,
) -> None:
    return None


@torch.library.impl(_LIBRARY, "sketch_histogram", "CompositeExplicitAutograd")
def _histogram(
    counters: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    counts: Tensor,
    row_cells: int,
    begin: int,
    end: int,
    least: Tensor,
    most: Tensor,
) -> Tensor:
    tiles = Tiles(counters, minimum, maximum, counts, row_cells)
    out: Tensor = find("sketch_histogram", counters.device)(tiles, begin, end, least, most)
    return out


@torch.library.register_fake("bkd_fast::sketch_histogram", lib=_LIBRARY)
def _histogram_fake(
    counters: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    counts: Tensor,
    row_cells: int,
    begin: int,
    end: int,
    least: Tensor,
    most: Tensor,
) -> Tensor:
    return counts.new_empty(end - begin, row_cells, counters.shape[1])


@torch.library.impl(_LIBRARY, "sketch_sort_", "CompositeExplicitAutograd")
def _sort(counters: Tensor, counts: Tensor, row_cells: int) -> None:
    find("sketch_sort_", counters.device)(counters, counts, row_cells)


@torch.library.register_fake("bkd_fast::sketch_sort_", lib=_LIBRARY)
def _sort_fake(counters: Tensor, counts: Tensor, row_cells: int) -> None:
    return None


@torch.library.impl(_LIBRARY, "sketch_quantile", "CompositeExplicitAutograd")
def _quantile(
    counters: Tensor, minimum: Tensor, maximum: Tensor, counts: Tensor, row_cells: int, q: float
) -> tuple[Tensor, Tensor, Tensor]:
    lower, upper, point = find("sketch_quantile", counters.device)(
        Tiles(counters, minimum, maximum, counts, row_cells), q
    )
    return lower, upper, point


@torch.library.register_fake("bkd_fast::sketch_quantile", lib=_LIBRARY)
def _quantile_fake(
    counters: Tensor, minimum: Tensor, maximum: Tensor, counts: Tensor, row_cells: int, q: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (counts.shape[0], row_cells)
    codes = counts.new_empty(shape)
    return codes, torch.empty_like(codes), counts.new_empty(shape, dtype=torch.float32)


@torch.library.impl(_LIBRARY, "sketch_deviance_quantile", "CompositeExplicitAutograd")
def _deviance(
    counters: Tensor, minimum: Tensor, maximum: Tensor, counts: Tensor, row_cells: int, level: Tensor
) -> Tensor:
    tiles = Tiles(counters, minimum, maximum, counts, row_cells)
    out: Tensor = find("sketch_deviance_quantile", counters.device)(tiles, level)
    return out


@torch.library.register_fake("bkd_fast::sketch_deviance_quantile", lib=_LIBRARY)
def _deviance_fake(
    counters: Tensor, minimum: Tensor, maximum: Tensor, counts: Tensor, row_cells: int, level: Tensor
) -> Tensor:
    return counts.new_empty(counts.shape, dtype=torch.float32)


@torch.library.impl(_LIBRARY, "sketch_merge_", "CompositeExplicitAutograd")
def _merge(
    counters: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    counts: Tensor,
    other_counters: Tensor,
    other_minimum: Tensor,
    other_maximum: Tensor,
    other_counts: Tensor,
    row_cells: int,
) -> None:
    find("sketch_merge_", counters.device)(
        Tiles(counters, minimum, maximum, counts, row_cells),
        Tiles(other_counters, other_minimum, other_maximum, other_counts, row_cells),
    )


@torch.library.register_fake("bkd_fast::sketch_merge_", lib=_LIBRARY)
def _merge_fake(
    counters: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    counts: Tensor,
    other_counters: Tensor,
    other_minimum: Tensor,
    other_maximum: Tensor,
    other_counts: Tensor,
    row_cells: int,
) -> None:
    return None


def sketch_update_(tiles: Tiles, codes: Tensor, valid: Tensor | None = None, rows: Tensor | None = None) -> None:
    """Add W draws of codes for some rows, in place, counts included. Room for them (`check_room`) is the caller's to see to.

    Args:
        codes: int16 (W, B, row_cells).
        valid: bool (W, B): whether the draw of the row counts; None: all do.
        rows: int64 (B,), ascending, each at most once; one that is not below the number of rows is left out. Trusted. None: every
            row, and B is their number.

    Raises:
        ValueError: shapes, dtypes or devices that disagree. Nothing is changed then.
    """
    number, device = tiles.counts.numel(), tiles.counts.device
    size = number if rows is None else rows.numel()
    if codes.dtype != torch.int16 or codes.dim() != 3 or codes.shape[1:] != (size, tiles.row_cells):
        raise ValueError(
            f"codes are {codes.dtype} {tuple(codes.shape)}: must be torch.int16 (draws, {size}, {tiles.row_cells})"
        )
    if valid is not None and (valid.dtype != torch.bool or valid.shape != codes.shape[:2]):
        raise ValueError(f"valid is {valid.dtype} {tuple(valid.shape)}: must be torch.bool {tuple(codes.shape[:2])}")
    for name, tensor in (("codes", codes), ("valid", valid), ("rows", rows)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}: must be on {device}, where the tiles are")
    if size == 0:
        return
    rows = torch.arange(number, device=device) if rows is None else rows
    for begin in range(0, len(codes), MAX_WINDOW):
        window = slice(begin, begin + MAX_WINDOW)
        torch.ops.bkd_fast.sketch_update_(
            *tiles, codes[window].contiguous(), None if valid is None else valid[window].contiguous(), rows
        )


def sketch_histogram(
    tiles: Tiles, begin: int, end: int, least: Tensor | None = None, most: Tensor | None = None
) -> Histogram:
    """The cells of rows begin .. end - 1 as plain histograms, up to `bins` draws too.

    Args:
        least, most: int16 (end - begin, row_cells): the bins are those of a cell with these extremes, which must hold its own.
            None: its own.

    Raises:
        ValueError: a range outside the rows, or least and most of another shape or dtype.
    """
    if not 0 <= begin <= end <= tiles.counts.numel():
        raise ValueError(f"rows {begin} .. {end}: must be in 0 .. {tiles.counts.numel()}")
    shape = (end - begin, tiles.row_cells)
    cells = slice(begin * tiles.row_cells, end * tiles.row_cells)
    least = tiles.minimum[cells].view(shape) if least is None else least.contiguous()
    most = tiles.maximum[cells].view(shape) if most is None else most.contiguous()
    for name, codes in (("least", least), ("most", most)):
        if codes.shape != shape or codes.dtype != torch.int16:
            raise ValueError(f"{name} is {codes.dtype} {tuple(codes.shape)}: must be torch.int16 {shape}")
    counts: Tensor = torch.ops.bkd_fast.sketch_histogram(*tiles, begin, end, least, most)
    low, high = least.int(), most.int()
    level = level_of(low, high, tiles.counters.shape[1])
    number = (low >> level)[..., None] + torch.arange(tiles.counters.shape[1], dtype=torch.int32, device=low.device)
    first = torch.maximum(number << level[..., None], low[..., None])
    last = torch.minimum(((number + 1) << level[..., None]) - 1, high[..., None])
    return Histogram(counts, first, last)


def level_of(minimum: Tensor, maximum: Tensor, bins: int) -> Tensor:
    """The least e with (max >> e) - (min >> e) < bins, of int32 codes; 0 without draws (min > max)."""
    level = torch.zeros_like(minimum)
    for _ in range(16):
        level += ((maximum >> level) - (minimum >> level) >= bins).int()
    return level


def sketch_sort_(tiles: Tiles) -> None:
    """Sort the codes that cells still keep, in place: equal multisets of codes are then equal tiles, bit for bit."""
    torch.ops.bkd_fast.sketch_sort_(tiles.counters, tiles.counts, tiles.row_cells)


def sketch_quantile(tiles: Tiles, q: float) -> CodeQuantile:
    """The order statistic ceil(q n) of every cell (NumPy's `inverted_cdf`), n its row's count.

    Raises:
        ValueError: q is not in [0, 1].
    """
    if not 0 <= q <= 1:
        raise ValueError(f"q = {q!r}: must be in [0, 1]")
    return CodeQuantile(*torch.ops.bkd_fast.sketch_quantile(*tiles, q))


def sketch_deviance_quantile(tiles: Tiles, level: Tensor) -> Tensor:
    """Per row, the `level` quantile of the values -2 log p, each weighing p: float32 (rows,), NaN without draws.

    Cells are classes and codes logits, p = sigmoid(code / 1024); all cells and draws of the row are pooled, the weights
    normalised. Where codes are counted, a bin stands for 8 points evenly spread over it.

    Args:
        level: float64 (rows,), in (0, 1].

    Raises:
        ValueError: another shape or dtype.
    """
    if level.dtype != torch.float64 or level.shape != tiles.counts.shape:
        raise ValueError(
            f"level is {level.dtype} {tuple(level.shape)}: must be torch.float64 {tuple(tiles.counts.shape)}"
        )
    out: Tensor = torch.ops.bkd_fast.sketch_deviance_quantile(*tiles, level)
    return out


def sketch_merge_(tiles: Tiles, other: Tiles) -> None:
    """Add the codes of `other` to `tiles`, in place, counts included.

    Raises:
        ValueError: shapes or row_cells that differ, or more than 65,535 pooled draws in a row. Nothing is changed then.
    """
    if tiles.counters.shape != other.counters.shape or tiles.counts.shape != other.counts.shape:
        raise ValueError(
            f"other has counters {tuple(other.counters.shape)} and {other.counts.numel()} rows: must have "
            f"{tuple(tiles.counters.shape)} and {tiles.counts.numel()}"
        )
    if tiles.row_cells != other.row_cells:
        raise ValueError(f"other has row_cells = {other.row_cells}: must be {tiles.row_cells}")
    check_room(tiles.counts, other.counts)
    torch.ops.bkd_fast.sketch_merge_(*tiles[:4], *other)
    tiles.counts.add_(other.counts)


def check_room(counts: Tensor, more: Tensor | int) -> None:
    """Refuse a row of more than 65,535 draws, which uint16 counters could not hold. Waits for the device of `counts`.

    Raises:
        ValueError: some counts + more exceed it.
    """
    if counts.numel() == 0:
        return
    pooled = int((counts + more).max())
    if pooled > MAX_COUNT:
        raise ValueError(f"{pooled} draws in one row: a posterior holds at most {MAX_COUNT}")
