"""SGNHT: SGHMC with thermostats, which take the minibatch noise out of the temperature."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Unpack

import torch
from torch import Tensor

from bkd_fast.samplers.sampler import Sampler, rates_of, real_of
from bkd_fast.samplers.settings import Params, Settings, check_number, is_cold, is_zero
from bkd_fast.sharding import local, sum_of_parts

CHUNK = 4096  # elements whose squares one thread adds up


class SGNHT(Sampler):
    r"""Stochastic gradient Nose-Hoover thermostats (Ding et al., NIPS 2014), one for every element (Gan et al., ICML 2015).

    `SGHMC` whose momentum mu, of every element, follows the temperature that its momentum buffer shows; with
    g = grad L + (prior_precision / N) (theta - prior_mean), mu0 = `momentum` and k = `rate`::

        b     <- mu b + g + sqrt(2 (1 - mu0) T / (lr N)) xi
        theta <- theta - lr b
        mu    <- mu - k (lr N (1 + mu) b^2 / (2 T) - 1)            (the right-hand side's mu is the old one)

    In equilibrium E[lr N (1 + mu) b^2 / 2] = T exactly, whatever the minibatch noise, if it is normal and constant: where SGHMC
    would sample at the temperature T (1 + noise_share), mu falls until the friction 1 - mu takes the surplus. On a curvature l
    of the mean loss the stationary variance is T / (N l) up to terms of k (the thermostats fluctuate, with standard deviation
    sqrt(k)) and of lr l. At temperature 0 the thermostats rest, and it is SGD with momentum, bit for bit.

    28 bytes per float32 parameter: theta, b and mu read and written, the gradient read. Thermostats need some
    (1 - mu0) / k steps of burn-in.

    With `per_element=False` each chain has one mu, as in Ding et al., which follows the mean of b^2 over the whole group:
    20 bytes, and another pass to add the squares up (in a fixed order, whatever the number of threads). It tells apart no
    parameters whose gradients are noisier than others'; elements of their own do.

    Args:
        momentum: mu0 in [0, 1): where mu begins, and the noise that is injected.
        rate: k > 0; None: (1 - mu0)^2 / 16, thermostats that fluctuate by a quarter of the friction.
        per_element: whether every element has a thermostat, or each chain one for a whole group.
        params, lr, settings: as every sampler has them: `Sampler`.

    Raises:
        ValueError: momentum outside [0, 1), or rate not positive; per_element = False with capturable.
    """

    rule = "sgnht"
    states = ("momentum_buffer", "thermostat")
    momentum = "momentum_buffer"
    noise_over_lr = True
    noise_in_gradient = True
    takes_out_gradient_noise = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        rate: float | None = None,
        per_element: bool = True,
        **settings: Unpack[Settings],
    ) -> None:
        own = {"momentum": momentum, "rate": rate, "per_element": per_element, "thermostat": None}
        super().__init__(params, lr, own, settings)

    def _rule_of(self, group: dict[str, Any]) -> str:
        return "sgnht" if group["per_element"] else "sghmc"

    def _states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.states if group["per_element"] else self.states[:1]

    def _numbers_are_tensors(self, group: dict[str, Any]) -> bool:
        return not group["per_element"] or super()._numbers_are_tensors(group)

    def _check_settings(self, group: dict[str, Any], wait: bool = False) -> None:
        super()._check_settings(group, wait)
        check_number("momentum", group["momentum"], 0, 1)
        if group["rate"] is not None and not 0 < group["rate"] < float("inf"):
            raise ValueError(f"rate = {group['rate']}: must be positive and finite")
        if not group["per_element"] and group["capturable"]:
            raise ValueError(
                "per_element = False with capturable = True: a replay would repeat the thermostat of the capture"
            )

    def _numbers(
        self, group: dict[str, Any], lr: Any, temperature: Any, num_data: Any, step: Any, m: ModuleType
    ) -> tuple[Any, ...]:
        friction = 1 - group["momentum"]
        sigma = m.sqrt(2 * friction * temperature / (lr * num_data))
        if not group["per_element"]:
            return lr, sigma, self._thermostat_of(group), 1.0
        if is_cold(group):
            return lr, sigma, 0.0, 0.0
        rate = _rate_of(group)
        gain = -rate * lr * num_data / (2 * temperature)
        if m is math:
            return lr, sigma, gain, rate
        still = lr == 0  # thermostats rest
        if isinstance(group["temperature"], Tensor):
            still = still | (temperature == 0)
        zero = self._constants.on(lr.device, 0.0)
        return lr, sigma, torch.where(still, zero, gain), torch.where(still, zero, self._constants.on(lr.device, rate))

    def _thermostat_of(self, group: dict[str, Any]) -> Tensor:
        """Each chain's mu, float64 (chains,) on the device of the group's first parameter."""
        device = group["params"][0].device
        if group["thermostat"] is None:
            group["thermostat"] = torch.full((group["chains"],), group["momentum"], dtype=torch.float64, device=device)
        thermostat: Tensor = group["thermostat"].to(device)
        return thermostat

    def _finish(self, group: dict[str, Any]) -> None:
        if group["per_element"] or is_zero(group["lr"]) or is_cold(group):
            return
        mu = self._thermostat_of(group)
        buffers = [
            self.state[p]["momentum_buffer"] for p in group["params"] if "momentum_buffer" in self.state.get(p, {})
        ]
        if buffers:
            sums = [sum_of_parts(_sum_of_squares(local(b), group["chains"]), b).to(mu) for b in buffers]
            squares = torch.stack(sums).sum(0)
            mean = squares / (sum(b.numel() for b in buffers) // group["chains"])
            lr, temperature = (rate.to(mu) for rate in rates_of(group))
            excess = lr * group["num_data"] * (1 + mu) * mean / (2 * temperature) - 1
            # a new one: saved states keep the old
            group["thermostat"] = torch.where(temperature > 0, mu - _rate_of(group) * excess, mu)

    def _start_of(self, name: str, group: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        if name != "thermostat":
            return super()._start_of(name, group)
        return lambda theta: torch.full_like(theta, group["momentum"], dtype=real_of(theta), requires_grad=False)

    def effective_lr(self, group: dict[str, Any]) -> float:
        return super().effective_lr(group) / (1 - float(group["momentum"]))

    def _momentum_deviation(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        lr, temperature = rates_of(group)
        return torch.sqrt(2 / (1 + group["momentum"]) * temperature / (lr * group["num_data"]))


def _rate_of(group: dict[str, Any]) -> float:
    return (1 - group["momentum"]) ** 2 / 16 if group["rate"] is None else float(group["rate"])


def _sum_of_squares(tensor: Tensor, chains: int) -> Tensor:
    """Of each chain, float64 (chains,): chunk by chunk, so that the number of threads does not change the order."""
    flat = tensor.reshape(chains, -1)
    whole = flat.shape[1] // CHUNK * CHUNK
    chunks = flat[:, :whole].reshape(chains, -1, CHUNK).double().square().sum(-1)
    return chunks.sum(-1) + flat[:, whole:].double().square().sum(-1)
