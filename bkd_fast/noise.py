"""The public face of the noise: normals by coordinate, the same bits on every device, shard and resume."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.noise import normal_


def normal(
    shape: Sequence[int] | int,
    *,
    seed: int,
    chain: int = 0,
    step: int = 0,
    parameter: int = 0,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The standard normals that a sampler adds: xi(seed, chain, step, parameter, element).

    A pure function: a part of a tensor, asked for with its `offset`, equals that part of the whole.

    Args:
        shape: shape of the result; element numbers run in row-major order.
        seed: in [0, 2**64).
        chain: in [0, 2**20).
        step: in [0, 2**44); a sampler's first step is 0.
        parameter: in [0, 2**24): the position at which the parameter was added to the sampler.
        offset: the element number of the first element; elements are in [0, 2**38).
        device: where to make them.

    Returns:
        float32 tensor of that shape. |z| is at most 6.76 (the tail beyond has probability 1.4e-11).

    Raises:
        TypeError: a coordinate is no int.
        ValueError: a coordinate is outside its range.
    """
    out = torch.empty(shape, dtype=torch.float32, device=device)
    return normal_(out, seed=seed, chain=chain, step=step, parameter=parameter, first_element=offset)
