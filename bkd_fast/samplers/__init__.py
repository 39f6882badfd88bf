"""Samplers: torch optimizers whose stationary distribution is the posterior."""

from bkd_fast.samplers.adam_sghmc import AdamSGHMC
from bkd_fast.samplers.baoab import BAOAB
from bkd_fast.samplers.cyclical import CyclicalSchedule
from bkd_fast.samplers.mean import mean_model
from bkd_fast.samplers.psgld import PSGLD
from bkd_fast.samplers.sghmc import SGHMC
from bkd_fast.samplers.sgld import SGLD
from bkd_fast.samplers.sgnht import SGNHT

__all__ = ["BAOAB", "PSGLD", "SGHMC", "SGLD", "SGNHT", "AdamSGHMC", "CyclicalSchedule", "mean_model"]
