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
def sketch_deviance_quantile(tiles: Tiles, level: float) -> Tensor:
    out = torch.empty(tiles.counts.numel(), dtype=torch.float32)
    native.sketch_deviance_quantile(
        *addresses(tiles), level, out.data_ptr(), rows=out.numel(), row_cells=tiles.row_cells,
        bins=tiles.counters.shape[1], threads=threads(),
    )  # fmt: skip
    return out


@implements("sketch_merge_", "cpp")
def sketch_merge_(tiles: Tiles, other: Tiles) -> None:
    native.sketch_merge(
        *addresses(tiles), *addresses(other), rows=tiles.counts.numel(), row_cells=tiles.row_cells,
        bins=tiles.counters.shape[1], threads=threads(),
    )  # fmt: skip
