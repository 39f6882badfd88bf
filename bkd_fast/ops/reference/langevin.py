"""The Langevin step in NumPy, with fused multiply-adds emulated exactly: the oracle for the bits of a step."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bkd_fast.kernels.exact import fma
from bkd_fast.ops.langevin import LangevinStep
from bkd_fast.ops.noise import Tag
from bkd_fast.ops.reference.noise import normals, words
from bkd_fast.ops.reference.rounding import exponent_field, round_stochastically
from bkd_fast.ops.registry import implements


def _flat(tensor: Tensor) -> Tensor:
    """A view of a dense tensor's elements in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _array(tensor: Tensor, dtype: torch.dtype) -> NDArray:  # type: ignore[type-arg]
    return _flat(tensor).to(dtype).numpy().copy()


@implements("langevin_step_", "reference")
def langevin_step_(s: LangevinStep) -> None:
    s = s.with_numbers()
    dtype = s.theta[0].dtype
    real = torch.float64 if dtype == torch.float64 else torch.float32
    number = np.float64 if real == torch.float64 else np.float32
    chain = s.master or s.theta
    for i, parameter in enumerate(s.theta):
        old, g = _array(chain[i], real), _array(s.gradient[i], real)
        finite = np.isfinite(g)
        if s.decay != 0:
            displacement = old - _array(s.center[i], real) if s.center else old
            g = fma(np.full_like(old, s.decay), displacement, g)
        new = fma(np.full_like(old, -s.lr), g, old)
        stream = {
            "seed": s.seed, "chain": s.chain, "step": s.step, "parameter": s.parameters[i],
            "first_element": s.first_elements[i],
        }  # fmt: skip
        if old.size and (s.sigma != 0 or s.noise_table is not None):
            noise = normals(old.size, tag=Tag.LANGEVIN, **stream).astype(number)
            if s.noise_table is None:
                sigma = np.full_like(old, s.sigma)
            else:
                sigma = s.noise_table.numpy()[exponent_field(new, dtype)]
            new = fma(sigma, noise, new)
        if s.nonfinite is not None:
            new = np.where(finite, new, old)
            s.nonfinite[i] |= not finite.all()
        if old.size and s.noise_table is not None:
            random = words(old.size, tag=Tag.STOCHASTIC_ROUNDING, **stream) >> np.uint32(16)
            new = round_stochastically(new, random, dtype)
        if s.master:
            _flat(s.master[i]).copy_(torch.from_numpy(new))
        _flat(parameter).copy_(torch.from_numpy(new))  # to nearest even
        if s.mean:
            stored, inverse = _array(chain[i], real), np.full_like(old, 1.0 / s.draws)
            mean, m2 = _array(s.mean[i], real), _array(s.m2[i], real)
            delta = stored - mean
            mean = fma(delta, inverse, mean)
            _flat(s.mean[i]).copy_(torch.from_numpy(mean))
            _flat(s.m2[i]).copy_(torch.from_numpy(fma(delta, stored - mean, m2)))


@implements("find_nonfinite", "reference")
def find_nonfinite(tensors: list[Tensor]) -> Tensor:
    return torch.stack([~torch.isfinite(tensor).all() for tensor in tensors])
