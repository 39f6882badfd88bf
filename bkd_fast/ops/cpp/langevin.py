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
    return list(map(Tensor.data_ptr, tensors))


@implements("langevin_step_", "cpp")
def langevin_step_(s: LangevinStep) -> None:
    native.langevin_step(
        s.rule,
        s.addresses("theta"),
        s.addresses("gradient"),
        s.addresses("center"),
        s.addresses("mean"),
        s.addresses("m2"),
        s.addresses("master"),
        s.addresses("first"),
        s.addresses("second"),
        list(map(Tensor.numel, s.theta)),
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
