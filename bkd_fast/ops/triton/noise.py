"""The noise on GPUs."""

from torch import Tensor

from bkd_fast.kernels import noise
from bkd_fast.kernels.launching import on_device_of
from bkd_fast.ops.registry import implements


@implements("normal_", "triton")
def normal_(out: Tensor, seed: int, chain: int, step: int, parameter: int, tag: int, first_element: int) -> None:
    with on_device_of(out):
        noise.normal_(out, seed, step, chain, parameter, tag, first_element)
