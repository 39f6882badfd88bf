"""Distillation: the teacher-informed prior as a loss."""

from bkd_fast.distill.loss import KDLoss
from bkd_fast.distill.topk import TopKLogits

__all__ = ["KDLoss", "TopKLogits"]
