"""The posterior predictive's update in Triton."""

import torch
from torch import Tensor

from bkd_fast.kernels import predictive
from bkd_fast.ops.predictive import PredictiveState
from bkd_fast.ops.registry import implements


@implements("predictive_update_", "triton")
def predictive_update_(
    logits: Tensor, rows: Tensor, batch: Tensor, state: PredictiveState, picked: Tensor, codes: Tensor, valid: Tensor
) -> None:
    tiles, *others = state
    with torch.cuda.device_of(logits):
        predictive.predictive_update_(logits, rows, batch, *tiles[:4], *others, picked, codes, valid)
