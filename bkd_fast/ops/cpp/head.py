"""The head step on the CPU: two matrix products of torch's around the compiled KD energy and the compiled Langevin step."""

import torch
from torch import Tensor

from bkd_fast.ops.head import HeadStep, composed_head_step_
from bkd_fast.ops.registry import implements


@implements("head_step_", "cpp")
def head_step_(s: HeadStep) -> tuple[Tensor, Tensor]:
    return composed_head_step_(s, torch.float32)
