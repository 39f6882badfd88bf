"""SGLD: stochastic gradient Langevin dynamics in the units of torch.optim.SGD."""

from types import ModuleType
from typing import Any, Unpack

from torch import Tensor

from bkd_fast.samplers.sampler import Sampler
from bkd_fast.samplers.settings import Params, Settings


class SGLD(Sampler):
    r"""Stochastic gradient Langevin dynamics (Welling and Teh, ICML 2011).

    With L the mean loss over a batch (minus the log posterior per example, without the parameters' prior), N = `num_data`,
    T = `temperature` and a Gaussian prior N(prior_mean, 1 / prior_precision) on the parameters::

        theta <- theta - lr (grad L + (prior_precision / N) (theta - prior_mean)) + sqrt(2 lr T / N) xi

    whose target is exp(-(N L + prior_precision / 2 |theta - prior_mean|^2) / T) as lr -> 0. `lr` is what
    `torch.optim.SGD` calls lr; the papers' epsilon is 2 lr / N. At temperature 0 this *is* SGD, bit for bit
    (`torch.optim.SGD(foreach=False)`, contiguous float32 and float64). On a curvature l of the mean loss the stationary
    variance is (T + lr N s^2 / 2) / (N l (1 - lr l / 2)), s^2 the variance of the minibatch gradient.

    One pass: 12 bytes per float32 parameter (read theta and its gradient, write theta), 6 per 16-bit one. The noise is a
    pure function of (seed, chain, step, parameter, element): equal on every device, shard and resume.

    Args:
        params, lr, settings: as every sampler has them: `Sampler`.
    """

    rule = "sgld"
    roundings = ("stochastic", "master", "nearest")

    def __init__(self, params: Params, lr: float | Tensor, **settings: Unpack[Settings]) -> None:
        super().__init__(params, lr, {}, settings)

    def _numbers(
        self, group: dict[str, Any], lr: Any, temperature: Any, num_data: Any, step: Any, m: ModuleType
    ) -> tuple[Any, ...]:
        return lr, m.sqrt(2 * lr * temperature / num_data)
