"""The noise on the CPU: vectorised, threaded."""

from torch import Tensor

from bkd_fast.ops.cpp import native, threads
from bkd_fast.ops.registry import implements


@implements("normal_", "cpp")
def normal_(out: Tensor, seed: int, chain: int, step: int, parameter: int, tag: int, first_element: int) -> None:
    native.normals(
        out.data_ptr(),
        out.numel(),
        seed=seed,
        step=step,
        chain=chain,
        parameter=parameter,
        tag=tag,
        first_element=first_element,
        threads=threads(),
    )
