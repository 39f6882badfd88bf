"""The KD energy on Triton's kernels (kernels/kd.py)."""

import torch
from torch import Tensor

from bkd_fast.kernels import kd, kd_settle
from bkd_fast.ops.faults import decode
from bkd_fast.ops.kd import Problem
from bkd_fast.ops.registry import implements


@implements("kd_energy", "triton")
def kd_energy(p: Problem) -> tuple[Tensor, Tensor, int, str]:
    """See `bkd_fast.ops.kd.Problem`. Where there is no register (Triton's interpreter, on a CPU) the fault is returned."""
    register = torch.zeros(1, dtype=torch.int64, device=p.logits.device) if p.register is None else p.register
    energy, gradient = kd.energy_and_gradient(
        p.logits, p.teacher, p.indices, p.rest, p.labels, p.soft, p.weights, prior=p.prior,
        teacher_is_probs=p.teacher_is_probs, prior_strength=p.prior_strength, temperature=p.temperature,
        label_weight=p.label_weight, label_smoothing=p.label_smoothing, ignore_index=p.ignore_index, scale=p.scale,
        tolerance_teacher=p.tolerance_teacher, tolerance_target=p.tolerance_target, signed_target=p.signed_target,
        teacher_by_label=p.teacher_by_label,
        total_factor=p.total_factor if p.summed else None, register=register, stamp=p.stamp,
    )  # fmt: skip
    fault = decode(int(register.item())) if p.register is None else None
    if fault is None:
        return energy, gradient, -1, ""
    return energy, gradient, fault.chain * p.logits.shape[1] + fault.row, fault.name


@implements("kd_scale_", "triton")
def kd_scale_(gradient: Tensor, incoming: Tensor, divisor: float) -> None:
    """gradient *= incoming / divisor in place, on the device; `incoming` is 0-dim."""
    kd_settle.multiply_(gradient, incoming, divisor)
