"""SGLD: stochastic gradient Langevin dynamics in the units of torch.optim.SGD."""

import math
from typing import Any

from torch import Tensor

from bkd_fast.ops.langevin import LangevinStep, unchecked_langevin_step_
from bkd_fast.samplers.layout import Launch
from bkd_fast.samplers.sampler import NonFinite, Params, PriorMean, Sampler


class SGLD(Sampler):
    r"""Stochastic gradient Langevin dynamics (Welling and Teh, ICML 2011).

    With L the mean loss over a batch (minus the log posterior per example, without the parameters' prior), N = `num_data`,
    T = `temperature` and a Gaussian prior N(prior_mean, 1 / prior_precision) on the parameters::

        theta <- theta - lr (grad L + (prior_precision / N) (theta - prior_mean)) + sqrt(2 lr T / N) xi

    whose target is exp(-(N L + prior_precision / 2 |theta - prior_mean|^2) / T) as lr -> 0. `lr` is what
    `torch.optim.SGD` calls lr; the papers' epsilon is 2 lr / N. At temperature 0 this *is* SGD, bit for bit
    (`torch.optim.SGD(foreach=False)`, contiguous float32 and float64). On a curvature l of the mean loss the stationary
    variance is (T + lr N s^2 / 2) / (N l (1 - lr l / 2)), s^2 the variance of the minibatch gradient.

    One pass: 12 bytes per float32 parameter (read theta and its gradient, write theta). The noise is a pure function of
    (seed, chain, step, parameter, element): equal on every device, shard and resume.

    Args:
        params: parameters, `model.named_parameters()` (recommended: messages and resuming use the names), or groups.
        lr: step size on the mean loss, at least 0; a number or a tensor. 0 moves nothing.
        num_data: size N of the training set; the loss must be the *mean* over the batch.
        temperature: T; 1 is the posterior, 0 is SGD, between them a cold posterior.
        prior_precision: tau of the Gaussian prior; without one, directions that the loss does not see diffuse for ever.
        prior_mean: mu of the prior: tensors in the order of the parameters, or by name; None for 0. Copied.
        weight_decay: the other spelling of prior_precision / num_data; giving both is an error.
        maximize: the loss is a mean log posterior, to be maximised.
        nonfinite: what a NaN or infinite gradient does. "raise": an error before anything moves (default on CPUs).
            "skip": the whole step is left out, its noise too. "record": such elements keep their value, `check()` tells
            (default on GPUs). "propagate": no check.
        seed: in [0, 2**64).
        chain: in [0, 2**20): chains of one seed are independent.

    Raises:
        TypeError: a parameter's dtype is not float32, float64, bfloat16 or float16; num_data is missing or no number.
        ValueError: any setting out of its range; the message names it.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        num_data: int,
        temperature: float = 1.0,
        prior_precision: float = 0.0,
        prior_mean: PriorMean | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
        nonfinite: NonFinite | None = None,
        seed: int = 0,
        chain: int = 0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "num_data": num_data,
                "temperature": temperature,
                "prior_precision": prior_precision,
                "prior_mean": prior_mean,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "nonfinite": nonfinite,
                "seed": seed,
                "chain": chain,
            },
        )

    def _launch(
        self,
        group: dict[str, Any],
        launch: Launch,
        center: list[Tensor],
        mean: list[Tensor],
        m2: list[Tensor],
        nonfinite: Tensor | None,
    ) -> None:
        lr, num_data = float(group["lr"]), float(group["num_data"])
        decay = group["weight_decay"] or group["prior_precision"] / num_data
        sign = -1.0 if group["maximize"] else 1.0  # negating lr and decay rounds exactly as negating the gradient
        unchecked_langevin_step_(
            LangevinStep(
                theta=launch.theta,
                gradient=launch.gradient,
                center=center,
                mean=mean,
                m2=m2,
                nonfinite=nonfinite,
                lr=sign * lr,
                decay=sign * decay,
                sigma=math.sqrt(2 * lr * group["temperature"] / num_data),
                seed=group["seed"],
                chain=group["chain"],
                step=group["step"],
                parameters=[group["parameter_ids"][index] for index in launch.indices],
                first_elements=[0] * len(launch.theta),
                draws=group["moments"]["draws"] if mean else 0,
            )
        )
