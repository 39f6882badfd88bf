"""The Langevin step on GPUs: all tensors of a call in one launch, through a table that stays on the device."""

import torch
from torch import Tensor

from bkd_fast.kernels import langevin
from bkd_fast.kernels.launching import on_device_of
from bkd_fast.kernels.table import table_of
from bkd_fast.ops.langevin import LangevinStep
from bkd_fast.ops.registry import implements
from bkd_fast.ops.rules import RULES


@implements("langevin_step_", "triton")
def langevin_step_(s: LangevinStep) -> None:
    with on_device_of(s.theta[0]):
        langevin.langevin_step_(
            table_of(**s.in_table()),
            s.theta[0].dtype,
            centered=bool(s.center),
            moments=bool(s.mean),
            master=bool(s.master),
            nonfinite=s.nonfinite,
            noise_table=s.noise_table,
            scalars=s.scalars,
            clock=s.clock,
            lr=s.lr,
            decay=s.decay,
            sigma=s.sigma,
            draws=s.draws,
            seed=s.seed,
            chain=s.chain,
            step=s.step,
            rule=s.rule,
            states=RULES[s.rule].states,
            own=s.own,
        )


@implements("find_nonfinite", "triton")
def find_nonfinite(tensors: list[Tensor]) -> Tensor:
    found = torch.zeros(len(tensors), dtype=torch.bool, device=tensors[0].device)
    with on_device_of(tensors[0]):
        langevin.find_nonfinite(table_of(tensors), tensors[0].dtype, found)
    return found
