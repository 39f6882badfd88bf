"""The sketch's tiles in CUDA: csrc/cuda/sketch.cu, one thread per cell."""

import numpy as np
import torch
from torch import Tensor

from bkd_fast.kernels.cuda import launch
from bkd_fast.ops.registry import implements
from bkd_fast.ops.sketch import TILE_CELLS, Tiles

_SOURCE = "sketch.cu"
_THREADS = 256  # kThreads of the source


def instance_of(kernel: str, bins: int) -> str:
    """The C++ name of a kernel for tiles of so many bins."""
    return f"bkd::{kernel}<{bins.bit_length() - 1}>"


def _launch_cells(kernel: str, counters: Tensor, *arguments: object) -> None:
    tiles, bins, _ = counters.shape
    if tiles:
        addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in (counters, *arguments)]
        launch(_SOURCE, instance_of(kernel, bins), (tiles,), (TILE_CELLS,), addresses, counters.device)


@implements("sketch_sort_", "cuda")
def sketch_sort_(counters: Tensor, counts: Tensor, row_cells: int) -> None:
    _launch_cells("sort_cells", counters, counts, counts.numel(), row_cells)


@implements("sketch_quantile", "cuda")
def sketch_quantile(tiles: Tiles, q: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, row_cells = tiles.counts.numel(), tiles.row_cells
    lower = tiles.counts.new_empty(rows, row_cells)
    upper = torch.empty_like(lower)
    point = torch.empty_like(lower, dtype=torch.float32)
    _launch_cells("quantile_cells", *tiles[:4], rows, row_cells, np.float64(q), lower, upper, point)
    return lower, upper, point


@implements("sketch_deviance_quantile", "cuda")
def sketch_deviance_quantile(tiles: Tiles, level: float) -> Tensor:
    counters, minimum, maximum, counts, row_cells = tiles
    out = torch.empty_like(counts, dtype=torch.float32)
    if out.numel():
        addresses = (tensor.data_ptr() for tensor in (counters, minimum, maximum, counts))
        arguments = (*addresses, row_cells, np.float64(level), out.data_ptr())
        instance = instance_of("deviance_quantile", counters.shape[1])
        launch(_SOURCE, instance, (out.numel(),), (_THREADS,), arguments, counts.device)
    return out


@implements("sketch_merge_", "cuda")
def sketch_merge_(tiles: Tiles, other: Tiles) -> None:
    _launch_cells("merge_tiles", *tiles[:4], *other[:4], tiles.counts.numel(), tiles.row_cells)
