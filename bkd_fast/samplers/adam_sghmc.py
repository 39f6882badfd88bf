"""AdamSGHMC: SGHMC whose coordinates have the step sizes of Adam."""

from types import ModuleType
from typing import Any, Unpack

import torch
from torch import Tensor

from bkd_fast.samplers.preconditioned import PreconditionedSampler
from bkd_fast.samplers.sampler import per_chain, rates_of
from bkd_fast.samplers.settings import Params, Settings, check_number


class AdamSGHMC(PreconditionedSampler):
    r"""SGHMC preconditioned as Adam is (Kingma and Ba, ICLR 2015): at temperature 0 it is `torch.optim.Adam`, to rounding.

    With g = grad L + (prior_precision / N) (theta - prior_mean), t the step from 1 and a = lr / (1 - beta1^t)::

        v     <- beta2 v + (1 - beta2) g^2
        D     =  sqrt(v / (1 - beta2^t)) + eps
        m     <- beta1 m + (1 - beta1) g + (1 - beta1) sqrt(2 T D / (a N)) xi
        theta <- theta - a m / D

    That is `SGHMC` with momentum and dampening beta1 and, at every coordinate, the step size a / D. While D stands still
    (`freeze_metric`) the stationary law is SGHMC's: on a curvature l of the mean loss theta has the variance
    (T / (N l)) (1 + beta1) / (1 + beta1 - lr (1 - beta1) l / (2 D)). While D follows the gradients a bias stays, larger the
    faster it follows.

    t counts the group's steps, so a parameter that had no gradient in the first ones is corrected less than torch would.
    28 bytes per float32 parameter: theta, m and v read and written, the gradient read.

    Args:
        betas: beta1 and beta2, both in [0, 1).
        eps: positive.
        params, lr, settings: as every sampler has them: `Sampler`.

    Raises:
        ValueError: betas or eps out of range.
    """

    rule = "adam"
    states = ("exp_avg", "exp_avg_sq")
    at_rest = (1.0, 0.0, 1.0, 0.0, None, None)
    momentum = "exp_avg"
    noise_over_lr = True
    noise_in_gradient = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(params, lr, {"betas": betas, "eps": eps, "frozen_at": None}, settings)

    def _check_settings(self, group: dict[str, Any], wait: bool = False) -> None:
        super()._check_settings(group, wait)
        for number, beta in enumerate(group["betas"]):
            if isinstance(beta, Tensor):
                raise ValueError(f"betas[{number}] = {beta}: must be a number")
            check_number(f"betas[{number}]", beta, 0, 1)

    def _numbers(
        self, group: dict[str, Any], lr: Any, temperature: Any, num_data: Any, step: Any, m: ModuleType
    ) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        steps = 1 + (step.double() if isinstance(step, Tensor) else step)
        rate = lr / (1 - beta1**steps)
        sigma = (1 - beta1) * m.sqrt(2 * temperature / (rate * num_data))
        still = group["frozen_at"] is not None
        correction = 1 - beta2 ** (group["frozen_at"] if still else steps)
        return (
            rate,
            sigma,
            beta1,
            1 - beta1,
            1.0 if still else beta2,
            0.0 if still else 1 - beta2,
            group["eps"],
            correction**-0.5,
        )

    def _inverse_metric(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        steps = group["frozen_at"] or max(group["step"], 1)
        corrected = self.state[parameter]["exp_avg_sq"] / (1 - group["betas"][1] ** steps)
        return torch.sqrt(corrected).add_(group["eps"])

    def _momentum_deviation(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        lr, temperature = rates_of(group)
        beta1 = group["betas"][0]
        rate = lr / (1 - beta1 ** (group["step"] + 1))
        share = 2 * (1 - beta1) / (1 + beta1) * temperature / (rate * group["num_data"])
        metric = self._inverse_metric(group, parameter).double()
        return (metric * per_chain(share, metric)).sqrt()
