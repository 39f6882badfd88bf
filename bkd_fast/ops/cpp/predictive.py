"""The posterior predictive's update on the CPU: vectorised, threaded over blocks of rows that share no tile."""

from torch import Tensor

from bkd_fast.ops.cpp import native, threads
from bkd_fast.ops.cpp.sketch import addresses
from bkd_fast.ops.predictive import PredictiveState
from bkd_fast.ops.registry import implements


@implements("predictive_update_", "cpp")
def predictive_update_(
    logits: Tensor, rows: Tensor, batch: Tensor, state: PredictiveState, picked: Tensor, codes: Tensor, valid: Tensor
) -> None:
    counters, minimum, maximum, counts = addresses(state.tiles)
    native.predictive_update(
        logits.data_ptr(),
        logits.stride(0),
        logits.shape[0],
        rows.data_ptr(),
        batch.data_ptr(),
        rows.numel(),
        counters,
        minimum,
        maximum,
        state.mean.data_ptr(),
        state.m2.data_ptr(),
        state.reference.data_ptr(),
        counts,
        state.invalid.data_ptr(),
        state.entropy.data_ptr(),
        state.divergence.data_ptr(),
        picked.data_ptr(),
        picked.shape[1],
        codes.data_ptr(),
        valid.data_ptr(),
        num_rows=state.tiles.counts.numel(),
        num_classes=state.tiles.row_cells,
        bins=state.tiles.counters.shape[1],
        threads=threads(),
    )
