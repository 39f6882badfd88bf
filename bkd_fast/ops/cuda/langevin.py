"""The Langevin step in CUDA: all tensors of a call in one launch of csrc/cuda/langevin.cu, through the table on the device."""

import numpy as np
import torch
from torch import Tensor

from bkd_fast.kernels.cuda import launch
from bkd_fast.kernels.table import Table, chain_stride, table_of
from bkd_fast.ops.langevin import LangevinStep
from bkd_fast.ops.registry import implements
from bkd_fast.ops.rules import OWN_NUMBERS

_SOURCE = "langevin.cu"
_THREADS = 128  # kThreads of the source
_NAMES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bkd::BFloat16",
    torch.float16: "bkd::Half",
}


def instance_of(dtype: torch.dtype, rounding: str, noisy: bool, prior: bool, moments: bool, rule: str = "sgld") -> str:
    """The C++ name of the step's kernel; rounding is "nearest", "stochastic" or "master"."""
    options = ", ".join(str(option).lower() for option in (noisy, prior, moments))
    return f"bkd::langevin_step<{_NAMES[dtype]}, bkd::Rule::{rule}, bkd::k{rounding.capitalize()}, {options}>"


def find_instance_of(dtype: torch.dtype) -> str:
    """The C++ name of `find_nonfinite`'s kernel."""
    return f"bkd::find_nonfinite<{_NAMES[dtype]}>"


def _launch(table: Table, instance: str, arguments: tuple[object, ...], device: torch.device) -> None:
    chunks = table.chunks.shape[0]
    if chunks:
        launch(_SOURCE, instance, (chunks,), (_THREADS,), arguments, device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@implements("langevin_step_", "cuda")
def langevin_step_(s: LangevinStep) -> None:
    dtype, device = s.theta[0].dtype, s.theta[0].device
    real = np.float64 if dtype == torch.float64 else np.float32
    rounding = "master" if s.master else "nearest" if s.noise_table is None else "stochastic"
    noisy = s.sigma != 0 or s.noise_table is not None
    with torch.cuda.device(device):
        table = table_of(**s.in_table())
    own = [*s.own, *[0.0] * (OWN_NUMBERS - len(s.own))]
    arguments = (
        table.rows.data_ptr(),
        table.labels.data_ptr(),
        table.chunks.data_ptr(),
        np.int32(table.size),
        _address(s.nonfinite),
        _address(s.noise_table),
        _address(s.scalars),
        _address(s.clock),
        np.uint64(s.seed),
        np.uint64(s.step),
        np.uint32(s.chain),
        np.int32(chain_stride(s.scalars)),
        np.int32(chain_stride(s.noise_table)),
        real(s.lr),
        real(s.decay),
        real(s.sigma),
        real(1 / s.draws if s.mean else 0),
        *map(real, own),
    )
    _launch(table, instance_of(dtype, rounding, noisy, s.decay != 0, bool(s.mean), s.rule), arguments, device)


@implements("find_nonfinite", "cuda")
def find_nonfinite(tensors: list[Tensor]) -> Tensor:
    dtype, device = tensors[0].dtype, tensors[0].device
    found = torch.zeros(len(tensors), dtype=torch.bool, device=device)
    with torch.cuda.device(device):
        table = table_of(tensors)
    arguments = (table.rows.data_ptr(), table.chunks.data_ptr(), np.int32(table.size), found.data_ptr())
    _launch(table, find_instance_of(dtype), arguments, device)
    return found
