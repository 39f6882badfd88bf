"""BAOAB: kinetic Langevin dynamics by the splitting whose positions are exact for Gaussians."""

from types import ModuleType
from typing import Any, Unpack

import torch
from torch import Tensor

from bkd_fast.samplers.sampler import Sampler, rates_of
from bkd_fast.samplers.settings import Params, Settings, check_number


class BAOAB(Sampler):
    r"""Kinetic Langevin dynamics, BAOAB splitting with merged kicks (Leimkuhler and Matthews, AMRX 2013).

    With h = sqrt(lr / N), unit mass, mu = exp(-friction h) and g = grad L + (prior_precision / N) (theta - prior_mean)::

        p     <- p - sqrt(lr N) g
        theta <- theta + (h / 2) p
        p     <- mu p + sqrt((1 - mu^2) T) xi
        theta <- theta + (h / 2) p

    whose target is exp(-(N L + prior_precision / 2 |theta - prior_mean|^2) / T). One gradient per step; for Gaussian targets
    the stationary variance of theta is *exactly* T / (N l) at any stable step, lr l < 4, on a curvature l of the mean loss; for
    others the error is of the second order in h where SGLD's is of the first. The stored p has E p^2 = T and E theta p = h T / 2.
    Without noise a step moves theta by lr g, as SGD does; at temperature 0 it is a damped descent.

    20 bytes per float32 parameter: theta and p read and written, the gradient read.

    Args:
        friction: gamma > 0, in units of 1 / h: mu = exp(-friction sqrt(lr / N)). A momentum mu as SGHMC has it is the friction
            -log(mu) sqrt(N / lr). lr (1 + mu) / (2 (1 - mu)) is the lr of the SGLD that diffuses as fast.
        params, lr, settings: as every sampler has them: `Sampler`.

    Raises:
        ValueError: friction is not positive.
    """

    rule = "baoab"
    states = ("momentum",)
    momentum = "momentum"

    def __init__(self, params: Params, lr: float | Tensor, *, friction: float, **settings: Unpack[Settings]) -> None:
        super().__init__(params, lr, {"friction": friction}, settings)

    def _check_settings(self, group: dict[str, Any], wait: bool = False) -> None:
        super()._check_settings(group, wait)
        check_number("friction", group["friction"], 0)
        if group["friction"] == 0:
            raise ValueError("friction = 0: must be positive")

    def _numbers(
        self, group: dict[str, Any], lr: Any, temperature: Any, num_data: Any, step: Any, m: ModuleType
    ) -> tuple[Any, ...]:
        h = m.sqrt(lr / num_data)
        mu = m.exp(-group["friction"] * h)
        return m.sqrt(lr * num_data), m.sqrt((1 - mu * mu) * temperature), mu, h / 2

    def effective_lr(self, group: dict[str, Any]) -> float:
        lr, _ = rates_of(group)
        mu = torch.exp(-group["friction"] * (lr / group["num_data"]).sqrt())
        return float((lr / 2 * (1 + mu) / (1 - mu)).mean())

    def _momentum_deviation(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        _, temperature = rates_of(group)
        return temperature.sqrt()
