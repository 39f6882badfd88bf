"""The sketch's tiles on the CPU: cells in parallel."""

import torch
from torch import Tensor

from bkd_fast.ops.cpp import native, threads
from bkd_fast.ops.registry import implements
from bkd_fast.ops.sketch import Tiles


def addresses(tiles: Tiles) -> tuple[int, int, int, int]:
    """Of counters, minimum, maximum and counts."""
    return (
        tiles.counters.data_ptr(),
        tiles.minimum.data_ptr(),
        tiles.maximum.data_ptr(),
        tiles.counts.data_ptr(),
    )


@implements("sketch_update_", "cpp")
def sketch_update_(tiles: Tiles, codes: Tensor, valid: Tensor | None, rows: Tensor) -> None:
    native.sketch_update(
        *addresses(tiles), codes.data_ptr(), 0 if valid is None else valid.data_ptr(), codes.shape[0], rows.data_ptr(),
        rows.numel(), num_rows=tiles.counts.numel(), row_cells=tiles.row_cells, bins=tiles.counters.shape[1],
        threads=threads(),
    )  # fmt: skip


@implements("sketch_histogram", "cpp")
def sketch_histogram(tiles: Tiles, begin: int, end: int, least: Tensor, most: Tensor) -> Tensor:
    bins = tiles.counters.shape[1]
    out = torch.empty(end - begin, tiles.row_cells, bins, dtype=torch.int32)
    native.sketch_histogram(
        *addresses(tiles), begin, end, least.data_ptr(), most.data_ptr(), out.data_ptr(), rows=tiles.counts.numel(),
        row_cells=tiles.row_cells, bins=bins, threads=threads(),
    )  # fmt: skip
    return out


@implements("sketch_sort_", "cpp")
def sketch_sort_(counters: Tensor, counts: Tensor, row_cells: int) -> None:
    native.sketch_sort(
        counters.data_ptr(), counts.data_ptr(), rows=counts.numel(), row_cells=row_cells, bins=counters.shape[1],
        threads=threads(),
    )  # fmt: skip


@implements("sketch_quantile", "cpp")
def sketch_quantile(tiles: Tiles, q: float) -> tuple[Tensor, Tensor, Tensor]:
    shape = (tiles.counts.numel(), tiles.row_cells)
    lower = torch.empty(shape, dtype=torch.int32)
    upper = torch.empty(shape, dtype=torch.int32)
    point = torch.empty(shape, dtype=torch.float32)
    native.sketch_quantile(
        *addresses(tiles), q, lower.data_ptr(), upper.data_ptr(), point.data_ptr(), rows=shape[0], row_cells=shape[1],
        bins=tiles.counters.shape[1], threads=threads(),
    )  # fmt: skip
    return lower, upper, point


@implements("sketch_deviance_quantile", "cpp")
def sketch_deviance_quantile(tiles: Tiles, level: Tensor) -> Tensor:
    out = torch.empty(tiles.counts.numel(), dtype=torch.float32)
    native.sketch_deviance_quantile(
        *addresses(tiles), level.data_ptr(), out.data_ptr(), rows=out.numel(), row_cells=tiles.row_cells,
        bins=tiles.counters.shape[1], threads=threads(),
    )  # fmt: skip
    return out


@implements("sketch_merge_", "cpp")
def sketch_merge_(tiles: Tiles, other: Tiles) -> None:
    native.sketch_merge(
        *addresses(tiles), *addresses(other), rows=tiles.counts.numel(), row_cells=tiles.row_cells,
        bins=tiles.counters.shape[1], threads=threads(),
    )  # fmt: skip
