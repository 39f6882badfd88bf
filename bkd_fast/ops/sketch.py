"""The dyadic logit histogram's tiles: making them canonical, reading quantiles off them, merging them.

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


class Tiles(NamedTuple):
    """Cells in rows of `row_cells` that share a count; cell = row * row_cells + position; padded to whole tiles."""

    counters: Tensor  # uint16 (tiles, bins, 64)
    minimum: Tensor  # int16 (tiles * 64,), CODE_MAX without draws
    maximum: Tensor  # int16 (tiles * 64,), CODE_MIN without draws
    counts: Tensor  # int32 (rows,)
    row_cells: int


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
_LIBRARY.define("sketch_sort_(Tensor(a!) counters, Tensor counts, int row_cells) -> ()")
_LIBRARY.define(f"sketch_quantile(Tensor counters, {_TILES}, float q) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(f"sketch_deviance_quantile(Tensor counters, {_TILES}, float level) -> Tensor")
_LIBRARY.define(
    "sketch_merge_(Tensor(a!) counters, Tensor(b!) minimum, Tensor(c!) maximum, Tensor counts, Tensor other_counters, "
    "Tensor other_minimum, Tensor other_maximum, Tensor other_counts, int row_cells) -> ()"
)


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
    counters: Tensor, minimum: Tensor, maximum: Tensor, counts: Tensor, row_cells: int, level: float
) -> Tensor:
    tiles = Tiles(counters, minimum, maximum, counts, row_cells)
    out: Tensor = find("sketch_deviance_quantile", counters.device)(tiles, level)
    return out


@torch.library.register_fake("bkd_fast::sketch_deviance_quantile", lib=_LIBRARY)
def _deviance_fake(
    counters: Tensor, minimum: Tensor, maximum: Tensor, counts: Tensor, row_cells: int, level: float
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


def sketch_deviance_quantile(tiles: Tiles, level: float) -> Tensor:
    """Per row, the `level` quantile of the values -2 log p, each weighing p: float32 (rows,), NaN without draws.

    Cells are classes and codes logits, p = sigmoid(code / 1024); all cells and draws of the row are pooled, the weights
    normalised. Where codes are counted, a bin stands for 8 points evenly spread over it.

    Raises:
        ValueError: level is not in (0, 1].
    """
    if not 0 < level <= 1:
        raise ValueError(f"level = {level!r}: must be in (0, 1]")
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
