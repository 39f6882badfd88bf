"""The Langevin step on the CPU: vectorised, threaded over chunks of all tensors."""

import torch
from torch import Tensor

from bkd_fast.ops.cpp import native, threads
from bkd_fast.ops.registry import implements

_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def _addresses(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@implements("langevin_step_", "cpp")
def langevin_step_(
    theta: list[Tensor],
    gradient: list[Tensor],
    center: list[Tensor],
    mean: list[Tensor],
    m2: list[Tensor],
    nonfinite: Tensor | None,
    lr: float,
    decay: float,
    sigma: float,
    seed: int,
    chain: int,
    step: int,
    parameters: list[int],
    first_elements: list[int],
    draws: int,
) -> None:
    native.langevin_step(
        _addresses(theta),
        _addresses(gradient),
        _addresses(center),
        _addresses(mean),
        _addresses(m2),
        [tensor.numel() for tensor in theta],
        first_elements,
        parameters,
        _NAMES[theta[0].dtype],
        seed=seed,
        step=step,
        chain=chain,
        lr=lr,
        decay=decay,
        sigma=sigma,
        draws=draws,
        nonfinite=0 if nonfinite is None else nonfinite.data_ptr(),
        threads=threads(),
    )


@implements("find_nonfinite", "cpp")
def find_nonfinite(tensors: list[Tensor]) -> Tensor:
    counts = [tensor.numel() for tensor in tensors]
    return torch.tensor(
        native.find_nonfinite(_addresses(tensors), counts, _NAMES[tensors[0].dtype], threads=threads()),
        dtype=torch.bool,
    )
