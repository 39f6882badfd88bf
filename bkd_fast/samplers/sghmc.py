"""SGHMC: stochastic gradient Hamiltonian Monte Carlo in the form and units of torch.optim.SGD with momentum."""

from types import ModuleType
from typing import Any, Unpack

import torch
from torch import Tensor

from bkd_fast.samplers.layout import Launch
from bkd_fast.samplers.sampler import Sampler, rates_of
from bkd_fast.samplers.settings import Params, Settings, check_number, is_cold


class SGHMC(Sampler):
    r"""Stochastic gradient Hamiltonian Monte Carlo (Chen, Fox and Guestrin, ICML 2014) as SGD with momentum.

    With mu = `momentum`, d = `dampening` and g = grad L + (prior_precision / N) (theta - prior_mean)::

        b     <- mu b + (1 - d) g + sqrt(2 (1 - mu) (1 - d) T / (lr N)) xi
        theta <- theta - lr b

    whose target is exp(-(N L + prior_precision / 2 |theta - prior_mean|^2) / T) as lr -> 0. At temperature 0 this *is*
    `torch.optim.SGD(momentum=mu, dampening=d, foreach=False)`, bit for bit, Nesterov's too. On a curvature l of the mean loss
    the stationary variance is (T / (N l)) (1 + mu) / (1 + mu - lr (1 - d) l / 2), that of b is
    2 (1 - d) T / (lr N (1 + mu - lr (1 - d) l / 2)). Minibatch noise of variance s^2 raises the temperature by the share
    lr (1 - d) N s^2 / (2 (1 - mu) T).

    There is no mass and no friction to choose: the friction is (1 - mu), the mass follows from lr. The chain starts at rest
    and needs some 1 / (1 - mu) steps to warm up; `draw_momentum` draws b from its stationary law (of flat directions).

    20 bytes per float32 parameter: theta and b read and written, the gradient read.

    Args:
        momentum: mu in [0, 1); 0 with dampening 0 is SGLD.
        dampening: d in [0, 1): lr (1 - d) / (1 - mu) is the lr of the SGLD that diffuses as fast. At temperature 0 the first
            step has none, as torch's.
        nesterov: at temperature 0 only: no noise makes it sample, whatever the curvature.
        params, lr, settings: as every sampler has them: `Sampler`.

    Raises:
        ValueError: momentum or dampening outside [0, 1); nesterov with a temperature above 0, without momentum, or with
            dampening.
    """

    rule = "sghmc"
    states = ("momentum_buffer",)
    at_rest = (1.0, 0.0)
    momentum = "momentum_buffer"
    noise_over_lr = True
    noise_in_gradient = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        own = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        super().__init__(params, lr, own, settings)

    def _check_settings(self, group: dict[str, Any], wait: bool = False) -> None:
        super()._check_settings(group, wait)
        check_number("momentum", group["momentum"], 0, 1)
        check_number("dampening", group["dampening"], 0, 1)
        if group["nesterov"] and not is_cold(group):
            raise ValueError(
                f"nesterov = True with temperature = {group['temperature']}: must be at temperature 0, no noise makes it sample"
            )
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov = True with momentum = {group['momentum']} and dampening = {group['dampening']}: needs a positive "
                "momentum and no dampening"
            )

    def _rule_of(self, group: dict[str, Any]) -> str:
        return "nesterov" if group["nesterov"] else "sghmc"

    def _numbers(
        self, group: dict[str, Any], lr: Any, temperature: Any, num_data: Any, step: Any, m: ModuleType
    ) -> tuple[Any, ...]:
        mu, share = group["momentum"], 1 - group["dampening"]
        return lr, m.sqrt(2 * (1 - mu) * share * temperature / (lr * num_data)), mu, share

    def _move(self, index: int, group: dict[str, Any], launch: Launch, collects: bool) -> None:
        dampened = group["dampening"] > 0 and is_cold(group)
        # state that a step at lr = 0 brought into being has taken no step
        none_yet = group["step"] == 0 and not group["capturable"]
        born: list[int] = []
        if dampened:
            born = [i for i in launch.indices if none_yet or self.states[0] not in self.state[group["params"][i]]]
        if not born:
            super()._move(index, group, launch, collects)
            return
        # torch's first step: b = g
        old = [i for i in launch.indices if i not in born]
        for part, settings in ((born, {**group, "dampening": 0.0}), (old, group)):
            if part:
                super()._move(index, settings, launch.of(part), collects)

    def effective_lr(self, group: dict[str, Any]) -> float:
        return super().effective_lr(group) * float((1 - group["dampening"]) / (1 - group["momentum"]))

    def _momentum_deviation(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        lr, temperature = rates_of(group)
        share = 2 * (1 - group["dampening"]) / (1 + group["momentum"])
        return torch.sqrt(share * temperature / (lr * group["num_data"]))
