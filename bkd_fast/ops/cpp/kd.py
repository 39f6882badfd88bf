"""The KD energy on the compiled CPU kernels (csrc/cpu/kd.cpp)."""

import torch
from torch import Tensor

from bkd_fast.ops.cpp import native, threads
from bkd_fast.ops.kd import Problem
from bkd_fast.ops.registry import implements

_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _name(tensor: Tensor | None) -> str:
    return "" if tensor is None else _NAMES[tensor.dtype]


@implements("kd_energy", "cpp")
def kd_energy(p: Problem) -> tuple[Tensor | float, Tensor, int, str]:
    """See `bkd_fast.ops.kd.Problem`."""
    chains, rows, classes = p.logits.shape
    gradient = torch.empty_like(p.logits)
    energy = None if p.summed else torch.empty((chains, rows), dtype=p.accumulator)
    total, bad_row, fault = native.kd_energy(
        _address(p.logits), _name(p.logits), _address(p.teacher), _name(p.teacher), p.teacher_by_label, _address(p.indices),
        p.indices is not None and p.indices.dtype == torch.int64, _address(p.rest),
        0 if p.indices is None else p.indices.shape[1], _address(p.labels), _address(p.soft), _name(p.soft), p.signed_target,
        _address(p.weights), p.weights is not None and p.weights.dim() == 2, _address(gradient), _address(energy), chains,
        rows, classes, 1 if p.teacher is None else p.teacher.shape[0], p.prior, p.teacher_is_probs, p.prior_strength,
        p.temperature, p.label_weight, p.label_smoothing, p.tolerance_teacher, p.tolerance_target, p.scale,
        p.ignore_index, threads(),
    )  # fmt: skip
    return p.total_factor * total if energy is None else energy, gradient, bad_row, fault
