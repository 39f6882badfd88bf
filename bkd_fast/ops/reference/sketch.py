"""The dyadic logit histogram in NumPy: one row of cells at a time, as its definition reads."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bkd_fast.ops.registry import implements
from bkd_fast.ops.sketch import CODE_MAX, CODE_MIN, CODES_PER_UNIT, TILE_CELLS, Tiles

Ints = NDArray[np.int64]
POINTS_PER_BIN = 8  # of the weighted deviance quantile


def level_of(minimum: Ints, maximum: Ints, bins: int) -> Ints:
    """The least e with (max >> e) - (min >> e) < bins, of every cell."""
    level = np.zeros_like(minimum)
    while (wide := (maximum >> level) - (minimum >> level) >= bins).any():
        level += wide
    return level


def count_codes(codes: Ints, level: Ints, bins: int) -> Ints:
    """Counters (cells, bins) of codes (draws, cells)."""
    counters = np.zeros((codes.shape[1], bins), np.int64)
    np.add.at(counters, (np.arange(codes.shape[1]), (codes >> level) & (bins - 1)), 1)
    return counters


def bins_in_order(counters: Ints, minimum: Ints, maximum: Ints, level: Ints) -> tuple[Ints, Ints]:
    """Counters (cells, bins) from the bin of the minimum upwards, and the number of each bin (code >> level)."""
    bins = counters.shape[1]
    numbers = (minimum >> level)[:, None] + np.arange(bins)
    ordered = np.take_along_axis(counters, numbers & (bins - 1), axis=1)
    return np.where(numbers <= (maximum >> level)[:, None], ordered, 0), numbers


def rescale(counters: Ints, minimum: Ints, maximum: Ints, level: Ints, to_level: Ints) -> Ints:
    """The same counts at a coarser level."""
    bins = counters.shape[1]
    ordered, numbers = bins_in_order(counters, minimum, maximum, level)
    coarser = np.zeros_like(counters)
    slots = (numbers >> (to_level - level)[:, None]) & (bins - 1)
    np.add.at(coarser, (np.arange(len(counters))[:, None], slots), ordered)
    return coarser


class Row:
    """The cells of one row: reads them out of the tiles, takes codes, writes them back."""

    def __init__(self, tiles: Tiles, row: int) -> None:
        counters = tiles.counters.numpy()
        self.bins = counters.shape[1]
        self.cells = np.arange(row * tiles.row_cells, (row + 1) * tiles.row_cells)
        self.count = int(tiles.counts[row])
        self._counters, self._minimum, self._maximum = counters, tiles.minimum.numpy(), tiles.maximum.numpy()
        self._tile, self._lane = self.cells // TILE_CELLS, self.cells % TILE_CELLS
        slots = counters[self._tile, :, self._lane]
        self.counters = slots.astype(np.int64)
        self.codes = slots[:, : self.count].view(np.int16).astype(np.int64).T  # (draws, cells), while they are kept
        self.minimum, self.maximum = (a[self.cells].astype(np.int64) for a in (self._minimum, self._maximum))

    @property
    def counting(self) -> bool:
        return self.count > int(self.bins)

    @property
    def level(self) -> Ints:
        return level_of(self.minimum, self.maximum, self.bins)

    def counters_at(self, level: Ints) -> Ints:
        if self.counting:
            return rescale(self.counters, self.minimum, self.maximum, self.level, level)
        return count_codes(self.codes, level, self.bins)

    def bounds(self) -> tuple[Ints, Ints, Ints]:
        """Of every bin from the minimum's upwards: count, first code and last code (cells, bins)."""
        level = self.level
        ordered, numbers = bins_in_order(self.counters, self.minimum, self.maximum, level)
        width = (1 << level)[:, None]
        first = np.maximum(numbers * width, self.minimum[:, None])
        last = np.minimum((numbers + 1) * width - 1, self.maximum[:, None])
        return ordered, first, last

    def write(self, counters: Ints, minimum: Ints, maximum: Ints) -> None:
        self._counters[self._tile, :, self._lane] = counters.astype(np.uint16)
        self._minimum[self.cells] = minimum
        self._maximum[self.cells] = maximum

    def write_codes(self, codes: Ints, minimum: Ints, maximum: Ints) -> None:
        kept = np.zeros((len(self.cells), self.bins), np.int16)
        kept[:, : len(codes)] = codes.T
        self.write(kept.view(np.uint16).astype(np.int64), minimum, maximum)

    def add(self, codes: Ints) -> None:
        """Take codes (draws, cells)."""
        minimum = np.minimum(self.minimum, codes.min(0))
        maximum = np.maximum(self.maximum, codes.max(0))
        if self.count + len(codes) <= self.bins:
            self.write_codes(np.concatenate([self.codes, codes]), minimum, maximum)
        else:
            level = level_of(minimum, maximum, self.bins)
            self.write(self.counters_at(level) + count_codes(codes, level, self.bins), minimum, maximum)


def rows_of(tiles: Tiles) -> Iterator[tuple[int, Row]]:
    """The rows that hold draws."""
    for row in tiles.counts.nonzero().flatten().tolist():
        yield row, Row(tiles, row)


@implements("sketch_update_", "reference")
def sketch_update_(tiles: Tiles, codes: Tensor, valid: Tensor | None, rows: Tensor) -> None:
    for b, r in enumerate(rows.tolist()):
        taken = codes[:, b] if valid is None else codes[valid[:, b], b]
        if r < tiles.counts.numel() and len(taken):
            Row(tiles, r).add(taken.numpy().astype(np.int64))
            tiles.counts[r] += len(taken)


@implements("sketch_histogram", "reference")
def sketch_histogram(tiles: Tiles, begin: int, end: int, least: Tensor, most: Tensor) -> Tensor:
    out = np.zeros((end - begin, tiles.row_cells, tiles.counters.shape[1]), np.int32)
    for r, row in rows_of(tiles):
        if begin <= r < end:
            low, high = (codes[r - begin].numpy().astype(np.int64) for codes in (least, most))
            level = level_of(low, high, row.bins)
            numbers = (low >> level)[:, None] + np.arange(row.bins)
            out[r - begin] = np.take_along_axis(row.counters_at(level), numbers & (row.bins - 1), axis=1)
    return torch.from_numpy(out)


@implements("sketch_sort_", "reference")
def sketch_sort_(counters: Tensor, counts: Tensor, row_cells: int) -> None:
    nothing = torch.zeros(counters.shape[0] * TILE_CELLS, dtype=torch.int16)  # extremes do not matter here
    for _, row in rows_of(Tiles(counters, nothing, nothing.clone(), counts, row_cells)):
        if not row.counting:
            row.write_codes(np.sort(row.codes, axis=0), row.minimum, row.maximum)


@implements("sketch_quantile", "reference")
def sketch_quantile(tiles: Tiles, q: float) -> tuple[Tensor, Tensor, Tensor]:
    shape = (tiles.counts.numel(), tiles.row_cells)
    lower, upper = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    point = np.full(shape, np.nan, np.float32)
    for r, row in rows_of(tiles):
        rank = min(max(int(np.ceil(q * row.count)), 1), row.count)
        if not row.counting:
            point[r] = lower[r] = upper[r] = np.sort(row.codes, axis=0)[rank - 1]
            continue
        counts, first, last = row.bounds()
        through = counts.cumsum(1)
        at = (np.arange(tiles.row_cells), (through >= rank).argmax(1))
        share = (rank - (through - counts)[at] - 0.5) / counts[at]
        lower[r], upper[r] = first[at], last[at]
        point[r] = first[at] - 0.5 + share * (last[at] - first[at] + 1)
    return torch.from_numpy(lower), torch.from_numpy(upper), torch.from_numpy(point)


@implements("sketch_deviance_quantile", "reference")
def sketch_deviance_quantile(tiles: Tiles, level: Tensor) -> Tensor:
    out = np.full(tiles.counts.numel(), np.nan, np.float32)
    for r, row in rows_of(tiles):
        if row.counting:
            counts, first, last = row.bounds()
            share = (np.arange(POINTS_PER_BIN) + 0.5) / POINTS_PER_BIN
            codes = (
                np.rint(first[..., None] - 0.5 + share * (last - first + 1)[..., None]).clip(CODE_MIN, CODE_MAX).ravel()
            )
            draws = np.repeat(counts.ravel() / POINTS_PER_BIN, POINTS_PER_BIN)
        else:
            codes, draws = row.codes.ravel().astype(np.float64), np.ones(row.codes.size)
        order = codes.argsort()[::-1]  # -2 log p falls with the code
        logits = codes[order] / CODES_PER_UNIT
        weight = (draws[order] / (1 + np.exp(-logits))).cumsum()
        reached = min(int(np.searchsorted(weight, float(level[r]) * weight[-1])), len(weight) - 1)
        out[r] = 2 * np.log1p(np.exp(-logits[reached]))
    return torch.from_numpy(out)


@implements("sketch_merge_", "reference")
def sketch_merge_(tiles: Tiles, other: Tiles) -> None:
    for r, theirs in rows_of(other):
        ours = Row(tiles, r)
        minimum = np.minimum(ours.minimum, theirs.minimum)
        maximum = np.maximum(ours.maximum, theirs.maximum)
        if ours.count + theirs.count <= ours.bins:
            ours.write_codes(np.sort(np.concatenate([ours.codes, theirs.codes]), axis=0), minimum, maximum)
        else:
            level = level_of(minimum, maximum, ours.bins)
            ours.write(ours.counters_at(level) + theirs.counters_at(level), minimum, maximum)
