"""Distillation: the teacher-informed prior as a loss."""

from bkd_fast.distill.loss import KDLoss

__all__ = ["KDLoss"]
