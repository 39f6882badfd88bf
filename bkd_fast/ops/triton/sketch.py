"""The sketch's tiles without CuPy: codes are added in Triton; the rest is done on the CPU, by copies there and back.

Tiles are read and merged seldom, and csrc/cuda has that as kernels; one in Triton, which cannot index a cell's slots, would gain
nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bkd_fast.kernels import predictive
from bkd_fast.kernels.launching import on_device_of
from bkd_fast.ops.registry import backends, find, implements, use_backend
from bkd_fast.ops.sketch import Tiles, tiles_on

_CPU = torch.device("cpu")


def _on_cpu(operation: str) -> Callable[..., Any]:
    """The CPU's own implementation, also where Triton's interpreter serves CPU tensors."""
    with use_backend("reference" if backends()["cpp"].missing else "cpp"):
        return find(operation, _CPU)


@implements("sketch_update_", "triton")
def sketch_update_(tiles: Tiles, codes: Tensor, valid: Tensor | None, rows: Tensor) -> None:
    with on_device_of(codes):
        predictive.sketch_update_(codes, valid, rows, *tiles)


@implements("sketch_histogram", "triton")
def sketch_histogram(tiles: Tiles, begin: int, end: int, least: Tensor, most: Tensor) -> Tensor:
    out: Tensor = _on_cpu("sketch_histogram")(tiles_on(tiles, _CPU), begin, end, least.cpu(), most.cpu())
    return out.to(tiles.counts.device)


@implements("sketch_sort_", "triton")
def sketch_sort_(counters: Tensor, counts: Tensor, row_cells: int) -> None:
    copied = counters.cpu()
    _on_cpu("sketch_sort_")(copied, counts.cpu(), row_cells)
    counters.copy_(copied)


@implements("sketch_quantile", "triton")
def sketch_quantile(tiles: Tiles, q: float) -> tuple[Tensor, Tensor, Tensor]:
    lower, upper, point = (
        found.to(tiles.counts.device) for found in _on_cpu("sketch_quantile")(tiles_on(tiles, _CPU), q)
    )
    return lower, upper, point


@implements("sketch_deviance_quantile", "triton")
def sketch_deviance_quantile(tiles: Tiles, level: Tensor) -> Tensor:
    out: Tensor = _on_cpu("sketch_deviance_quantile")(tiles_on(tiles, _CPU), level.cpu())
    return out.to(tiles.counts.device)


@implements("sketch_merge_", "triton")
def sketch_merge_(tiles: Tiles, other: Tiles) -> None:
    copied = tiles_on(tiles, _CPU)
    _on_cpu("sketch_merge_")(copied, tiles_on(other, _CPU))
    for array, merged in zip(tiles[:3], copied[:3], strict=True):
        array.copy_(merged)
