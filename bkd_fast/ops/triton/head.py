"""The head step on GPUs: torch's product for the logits, then two kernels. Faults are recorded, not raised (ops/faults.py)."""

import torch
from torch import Tensor

from bkd_fast.kernels import head
from bkd_fast.kernels.launching import on_device_of
from bkd_fast.ops.faults import Form, Inputs, register_of
from bkd_fast.ops.head import HeadStep, logits_of
from bkd_fast.ops.registry import implements


@implements("head_step_", "triton")
@torch.no_grad()
def head_step_(s: HeadStep) -> tuple[Tensor, Tensor]:
    x = s.x.contiguous()
    logits = logits_of(x.to(s.weight.dtype), s.weight, s.bias)
    target = None if s.target is None else s.target.contiguous()
    teacher = None if s.teacher is None else s.teacher.contiguous()
    register = register_of(x.device)
    stamp = register.begin(Form(), Inputs(logits, s.target, s.teacher, ignore_index=s.ignore_index))
    with on_device_of(x):
        energy, nonfinite = head.head_step_(
            logits, s.weight, s.bias, x, target, teacher, register.word, stamp,
            prior_strength=s.prior_strength, temperature=s.temperature, label_weight=s.label_weight,
            ignore_index=s.ignore_index, lr=s.lr, decay=s.decay, sigma=s.sigma, seed=s.seed, chain=s.chain, step=s.step,
            weight_parameter=s.weight_parameter, bias_parameter=s.bias_parameter,
        )  # fmt: skip
    return energy.mean(1), nonfinite
