"""The posterior predictive's update in CUDA: csrc/cuda/predictive.cu, on as many rows at a time as the L2 cache holds."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from bkd_fast.kernels.cuda import launching
from bkd_fast.ops.predictive import PredictiveState
from bkd_fast.ops.registry import implements
from bkd_fast.ops.sketch import TILE_CELLS

_SOURCE = "predictive.cu"
_THREADS = 256  # kThreads of the source
_WARP = 32
_SHORT_ROW, _SUM_LANES = 32, 16  # kShortRow and kSumLanes of csrc/predictive.h
_STATISTICS_BYTES = 32  # sizeof(DrawStatistics) of csrc/tile.h


def measure_instance_of(classes: int) -> str:
    """The C++ name of `measure_rows`' kernel."""
    return f"bkd::measure_rows<{str(classes <= _SHORT_ROW).lower()}>"


def update_instance_of(classes: int, bins: int) -> str:
    """The C++ name of `update_tiles`' kernel; bins = 1: without a histogram."""
    return f"bkd::update_tiles<{str(classes % 2 == 0).lower()}, {bins.bit_length() - 1}>"


@cache
def _rows_at_once(device: int, draws: int, classes: int) -> int:
    """Rows whose logits stay in half of the L2 cache, between the kernel that measures them and the one that bins them."""
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, int(cache_bytes) // (2 * 4 * draws * classes))


@implements("predictive_update_", "cuda")
def predictive_update_(
    logits: Tensor, rows: Tensor, batch: Tensor, state: PredictiveState, picked: Tensor, codes: Tensor, valid: Tensor
) -> None:
    device, classes, num_rows = logits.device, np.int32(state.tiles.row_cells), state.tiles.counts.numel()
    draws, size = np.int32(logits.shape[0]), rows.numel()
    if logits.data_ptr() % 8:  # pairs of logits are read as one
        logits = logits.clone()
    tiles_per_row = (int(classes) + TILE_CELLS - 2) // TILE_CELLS + 1
    at_once = min(size, _rows_at_once(device.index, int(draws), int(classes)))
    statistics = torch.empty(int(draws) * at_once * _STATISTICS_BYTES, dtype=torch.uint8, device=device)
    sums = torch.empty(at_once * tiles_per_row, dtype=torch.float64, device=device)
    tiles = state.tiles
    bins = tiles.counters.shape[1] if len(tiles.counters) else 1
    picks = picked.shape[1]
    measure, update = measure_instance_of(int(classes)), update_instance_of(int(classes), bins)
    with launching(device) as launch:
        for begin in range(0, size, at_once):
            end = min(begin + at_once, size)
            threads = int(draws) * (end - begin) * (1 if classes <= _SHORT_ROW else _SUM_LANES)
            launch(
                _SOURCE, measure, (-(-threads // _THREADS),), (_THREADS,),
                (
                    logits.data_ptr(), logits.stride(0), draws, batch.data_ptr(), begin, end - begin, classes,
                    statistics.data_ptr(),
                ),
            )  # fmt: skip
            launch(
                _SOURCE, update, ((end - begin) * tiles_per_row,), (_WARP,),
                (
                    logits.data_ptr(), logits.stride(0), draws, rows.data_ptr(), batch.data_ptr(), begin, end,
                    statistics.data_ptr(), sums.data_ptr(), tiles.counters.data_ptr(), tiles.minimum.data_ptr(),
                    tiles.maximum.data_ptr(), state.mean.data_ptr(), state.m2.data_ptr(), state.reference.data_ptr(),
                    tiles.counts.data_ptr(), num_rows, classes,
                ),
            )  # fmt: skip
            if picks:
                launch(
                    _SOURCE, "bkd::pick_codes", (-(-int(draws) * (end - begin) * picks // _THREADS),), (_THREADS,),
                    (
                        logits.data_ptr(), logits.stride(0), draws, rows.data_ptr(), batch.data_ptr(), begin, end, size,
                        statistics.data_ptr(), picked.data_ptr(), np.int32(picks), codes.data_ptr(), valid.data_ptr(), num_rows,
                        classes,
                    ),
                )  # fmt: skip
            launch(
                _SOURCE, "bkd::finish_rows", (-(-(end - begin) // _THREADS),), (_THREADS,),
                (
                    draws, rows.data_ptr(), begin, end, statistics.data_ptr(), sums.data_ptr(), tiles.counts.data_ptr(),
                    state.invalid.data_ptr(), state.entropy.data_ptr(), state.divergence.data_ptr(), num_rows, classes,
                ),
            )  # fmt: skip
