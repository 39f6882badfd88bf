"""The Langevin step in NumPy, with fused multiply-adds emulated exactly: the oracle for the bits of a step."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bkd_fast.ops.noise import Tag
from bkd_fast.ops.reference.arithmetic import fma
from bkd_fast.ops.reference.noise import normals
from bkd_fast.ops.registry import implements


def _flat(tensor: Tensor) -> Tensor:
    """A view of a dense tensor's elements in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _array(tensor: Tensor, dtype: torch.dtype) -> NDArray:  # type: ignore[type-arg]
    return _flat(tensor).to(dtype).numpy().copy()


@implements("langevin_step_", "reference")
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
    real = torch.float64 if theta[0].dtype == torch.float64 else torch.float32
    number = np.float64 if real == torch.float64 else np.float32
    for i, parameter in enumerate(theta):
        old, g = _array(parameter, real), _array(gradient[i], real)
        finite = np.isfinite(g)
        if decay != 0:
            displacement = old - _array(center[i], real) if center else old
            g = fma(np.full_like(old, decay), displacement, g)
        new = fma(np.full_like(old, -lr), g, old)
        if sigma != 0 and old.size:
            noise = normals(
                old.size, seed=seed, chain=chain, step=step, parameter=parameters[i], tag=Tag.LANGEVIN,
                first_element=first_elements[i],
            ).astype(number)  # fmt: skip
            new = fma(np.full_like(old, sigma), noise, new)
        if nonfinite is not None:
            new = np.where(finite, new, old)
            nonfinite[i] |= not finite.all()
        _flat(parameter).copy_(torch.from_numpy(new))
        if mean:
            stored, inverse = _array(parameter, real), np.full_like(old, 1.0 / draws)
            m, s = _array(mean[i], real), _array(m2[i], real)
            delta = stored - m
            m = fma(delta, inverse, m)
            _flat(mean[i]).copy_(torch.from_numpy(m))
            _flat(m2[i]).copy_(torch.from_numpy(fma(delta, stored - m, s)))


@implements("find_nonfinite", "reference")
def find_nonfinite(tensors: list[Tensor]) -> Tensor:
    return torch.stack([~torch.isfinite(tensor).all() for tensor in tensors])
