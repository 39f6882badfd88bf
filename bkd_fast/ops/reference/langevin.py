"""The Langevin step in NumPy, with fused multiply-adds emulated exactly: the oracle for the bits of a step."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bkd_fast.kernels.exact import fma
from bkd_fast.ops.langevin import LangevinStep
from bkd_fast.ops.noise import Tag
from bkd_fast.ops.reference.noise import normals, words
from bkd_fast.ops.reference.rounding import exponent_field, round_stochastically
from bkd_fast.ops.reference.rules import FUNCTIONS
from bkd_fast.ops.registry import implements


@implements("langevin_step_", "reference")
def langevin_step_(s: LangevinStep) -> None:
    numbers = s.numbers()
    for tensor in range(len(s.theta)):
        for chain in range(s.chains):
            _step(s, tensor, chain, numbers[chain % len(numbers)])


def _step(s: LangevinStep, tensor: int, chain: int, numbers: list[float]) -> None:
    """The step of one tensor of one chain."""
    dtype = s.theta[0].dtype
    real = torch.float64 if dtype == torch.float64 else torch.float32
    number = np.float64 if real == torch.float64 else np.float32

    def part(tensors: Sequence[Tensor]) -> Tensor:
        """A view of the elements of this tensor and chain in the order of their memory."""
        whole = tensors[tensor]
        count = whole.numel() // s.chains
        return whole.as_strided((count,), (1,), whole.storage_offset() + chain * count)

    def array(tensors: Sequence[Tensor]) -> NDArray:  # type: ignore[type-arg]
        return part(tensors).to(real).numpy().copy()

    holder = s.master or s.theta  # of the chain
    old, g = array(holder), array(s.gradient)
    finite = np.isfinite(g)
    lr, decay, sigma, *own = (number(x) for x in numbers)
    if decay != 0:
        displacement = old - array(s.center) if s.center else old
        g = fma(np.full_like(old, decay), displacement, g)
    stream = {
        "seed": s.seed, "chain": s.chain + chain, "step": s.step_number(), "parameter": s.parameters[tensor],
        "first_element": s.first_elements[tensor],
    }  # fmt: skip
    noisy = old.size and (sigma != 0 or s.noise_table is not None)
    noise = normals(old.size, tag=Tag.LANGEVIN, **stream).astype(number) if noisy else np.full_like(old, -0.0)
    before = [old, *(array(state) if state else old for state in (s.first, s.second))]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if s.noise_table is None:
            after: tuple[NDArray, ...] = FUNCTIONS[s.rule](*before, g, noise, lr, sigma, own)  # type: ignore[type-arg]
        else:
            drifted = fma(-lr, g, old)
            table = s.noise_table.view(-1, s.noise_table.shape[-1])
            after = (fma(table[chain % len(table)].numpy()[exponent_field(drifted, dtype)], noise, drifted),)
    if s.nonfinite is not None:
        after = tuple(np.where(finite, new, was) for new, was in zip(after, before, strict=False))
        s.nonfinite[tensor] |= not finite.all()
    new, *states = after
    if old.size and s.noise_table is not None:
        random = words(old.size, tag=Tag.STOCHASTIC_ROUNDING, **stream) >> np.uint32(16)
        new = round_stochastically(new, random, dtype)
    if s.master:
        part(s.master).copy_(torch.from_numpy(new))
    part(s.theta).copy_(torch.from_numpy(new))  # to nearest even
    for tensors, state in zip((s.first, s.second), states, strict=False):
        if tensors:
            part(tensors).copy_(torch.from_numpy(state))
    if s.mean:
        stored, inverse = array(holder), np.full_like(old, 1.0 / s.draws)
        mean, m2 = array(s.mean), array(s.m2)
        delta = stored - mean
        mean = fma(delta, inverse, mean)
        part(s.mean).copy_(torch.from_numpy(mean))
        part(s.m2).copy_(torch.from_numpy(fma(delta, stored - mean, m2)))


@implements("find_nonfinite", "reference")
def find_nonfinite(tensors: list[Tensor]) -> Tensor:
    return torch.stack([~torch.isfinite(tensor).all() for tensor in tensors])
