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


@implements("sketch_update_", "cuda")
def sketch_update_(tiles: Tiles, codes: Tensor, valid: Tensor | None, rows: Tensor) -> None:
    counters, minimum, maximum, counts, row_cells = tiles
    draws, size, rows_held = np.int32(codes.shape[0]), rows.numel(), counts.numel()
    mask = 0 if valid is None else valid.data_ptr()
    launch(
        _SOURCE, instance_of("update_cells", counters.shape[1]), (-(-size * row_cells // TILE_CELLS),), (TILE_CELLS,),
        (
            *(tensor.data_ptr() for tensor in (counters, minimum, maximum, counts)), rows_held, row_cells, codes.data_ptr(),
            mask, draws, rows.data_ptr(), size,
        ),
        counters.device,
    )  # fmt: skip
    launch(
        _SOURCE, "bkd::count_draws", (-(-size // _THREADS),), (_THREADS,),
        (counts.data_ptr(), rows_held, mask, draws, rows.data_ptr(), size), counters.device,
    )  # fmt: skip


@implements("sketch_histogram", "cuda")
def sketch_histogram(tiles: Tiles, begin: int, end: int, least: Tensor, most: Tensor) -> Tensor:
    counters, minimum, maximum, counts, row_cells = tiles
    bins = counters.shape[1]
    out = counts.new_empty(end - begin, row_cells, bins)
    if out.numel():
        launch(
            _SOURCE, instance_of("histogram_cells", bins), (-(-(end - begin) * row_cells // TILE_CELLS),), (TILE_CELLS,),
            (
                *(tensor.data_ptr() for tensor in (counters, minimum, maximum, counts)), row_cells, begin, end,
                least.data_ptr(), most.data_ptr(), out.data_ptr(),
            ),
            counters.device,
        )  # fmt: skip
    return out


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
def sketch_deviance_quantile(tiles: Tiles, level: Tensor) -> Tensor:
    counters, minimum, maximum, counts, row_cells = tiles
    out = torch.empty_like(counts, dtype=torch.float32)
    if out.numel():
        addresses = (tensor.data_ptr() for tensor in (counters, minimum, maximum, counts))
        arguments = (*addresses, row_cells, level.data_ptr(), out.data_ptr())
        instance = instance_of("deviance_quantile", counters.shape[1])
        launch(_SOURCE, instance, (out.numel(),), (_THREADS,), arguments, counts.device)
    return out


@implements("sketch_merge_", "cuda")
def sketch_merge_(tiles: Tiles, other: Tiles) -> None:
    _launch_cells("merge_tiles", *tiles[:4], *other[:4], tiles.counts.numel(), tiles.row_cells)
