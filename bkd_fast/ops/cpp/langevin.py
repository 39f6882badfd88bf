"""The Langevin step on the CPU: vectorised, threaded over chunks of all tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.cpp import native, threads
from bkd_fast.ops.langevin import LangevinStep
from bkd_fast.ops.registry import implements

_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@implements("langevin_step_", "cpp")
def langevin_step_(s: LangevinStep) -> None:
    native.langevin_step(
        s.rule,
        _addresses(s.theta),
        _addresses(s.gradient),
        _addresses(s.center),
        _addresses(s.mean),
        _addresses(s.m2),
        _addresses(s.master),
        _addresses(s.first),
        _addresses(s.second),
        [tensor.numel() for tensor in s.theta],
        s.first_elements,
        s.parameters,
        _NAMES[s.theta[0].dtype],
        seed=s.seed,
        step=s.step_number(),
        chain=s.chain,
        chains=s.chains,
        numbers=s.numbers(),
        draws=s.draws,
        noise_table=0 if s.noise_table is None else s.noise_table.data_ptr(),
        nonfinite=0 if s.nonfinite is None else s.nonfinite.data_ptr(),
        threads=threads(),
    )


@implements("find_nonfinite", "cpp")
def find_nonfinite(tensors: list[Tensor]) -> Tensor:
    counts = [tensor.numel() for tensor in tensors]
    found = torch.zeros(len(tensors), dtype=torch.bool)
    for number in native.find_nonfinite(_addresses(tensors), counts, _NAMES[tensors[0].dtype], threads=threads()):
        found[number] = True
    return found
