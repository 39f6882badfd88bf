"""Samplers: torch optimizers whose stationary distribution is the posterior."""

from bkd_fast.samplers.sgld import SGLD

__all__ = ["SGLD"]
