"""The posterior predictive's update in Triton."""

from torch import Tensor

from bkd_fast.kernels import predictive
from bkd_fast.kernels.launching import on_device_of
from bkd_fast.ops.predictive import PredictiveState
from bkd_fast.ops.registry import implements


@implements("predictive_update_", "triton")
def predictive_update_(
    logits: Tensor, rows: Tensor, batch: Tensor, state: PredictiveState, picked: Tensor, codes: Tensor, valid: Tensor
) -> None:
    tiles, *others = state
    with on_device_of(logits):
        predictive.predictive_update_(logits, rows, batch, *tiles[:4], *others, picked, codes, valid)
