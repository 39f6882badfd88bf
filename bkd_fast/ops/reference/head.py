"""The head step with its energy and gradient in float64, rounded to float32 before the Langevin step: the oracle."""

import torch
from torch import Tensor

from bkd_fast.ops.head import HeadStep, composed_head_step_
from bkd_fast.ops.registry import implements


@implements("head_step_", "reference")
def head_step_(s: HeadStep) -> tuple[Tensor, Tensor]:
    return composed_head_step_(s, torch.float64)
