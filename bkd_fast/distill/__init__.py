"""Distillation: the teacher-informed prior as a loss."""

from bkd_fast.distill.loss import KDLoss
from bkd_fast.ops.topk import TopKLogits

__all__ = ["KDLoss", "TopKLogits"]
