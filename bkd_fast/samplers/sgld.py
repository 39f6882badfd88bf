"""SGLD: stochastic gradient Langevin dynamics in the units of torch.optim.SGD."""

import math
from typing import Any

import torch
from torch import Tensor

from bkd_fast.ops.langevin import LangevinStep, unchecked_langevin_step_
from bkd_fast.samplers.layout import Launch
from bkd_fast.samplers.sampler import NonFinite, Params, PriorMean, Rounding, Sampler


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
        rounding: how bfloat16 and float16 parameters keep a chain that moves by less than their spacing (docs/samplers.md §5);
            parameters of other dtypes ignore it. "stochastic": theta is rounded to a neighbour at random, and the noise made
            smaller, so that both together have the variance above; right where the spacing is below a quarter of the
            posterior's standard deviation (with `track_moments` the sampler warns if it is not; without, nothing tells).
            "master": float32 copies in the sampler's state hold the chain and theta is their nearest; 12 bytes per
            parameter. The copies are made of theta at the first step and are the truth from then on: what something else
            writes to theta (`model.load_state_dict`) is overwritten, so make a new sampler then. "nearest": rounds most of
            the noise away, and warns. At temperature 0 all but "master" round to nearest.
        capturable: keep the step, lr and the noise scale on the device, so that a CUDA graph that holds the step draws fresh
            noise at every replay, the noise of steps k, k + 1, ...: take one step before capturing. lr becomes a tensor
            there (one of your own on that device stays): schedulers fill it in place, and a graph follows. The other settings
            are those of the capture. A learning rate of 0 is not known to the host then, but moves nothing and uses up no
            noise. Not with `track_moments`. On CPUs it works too, for nothing.
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
        rounding: Rounding = "stochastic",
        capturable: bool = False,
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
                "rounding": rounding,
                "capturable": capturable,
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
        clock: Tensor | None,
    ) -> None:
        num_data = float(group["num_data"])
        decay = group["weight_decay"] or group["prior_precision"] / num_data
        sign = -1.0 if group["maximize"] else 1.0  # negating lr and decay rounds exactly as negating the gradient
        scalars = None
        if clock is None:
            lr = float(group["lr"])
            sigma = math.sqrt(2 * lr * group["temperature"] / num_data)
            table = self._noise_table_of(group, launch, sigma)
        else:
            scalars, sigma_there = _on_device(group, launch.theta[0], sign, decay, num_data)
            table = self._noise_table_of(group, launch, sigma_there)
            lr, sigma = math.nan, math.nan if group["temperature"] > 0 else 0.0  # to be taken from the device
            clock = clock.to(launch.theta[0].device)
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
                sigma=sigma,
                seed=group["seed"],
                chain=group["chain"],
                step=group["step"],
                parameters=[group["parameter_ids"][index] for index in launch.indices],
                first_elements=[0] * len(launch.theta),
                draws=group["moments"]["draws"] if mean else 0,
                master=self._masters_of(group, launch),
                noise_table=table,
                scalars=scalars,
                clock=clock,
            )
        )


def _on_device(
    group: dict[str, Any], theta: Tensor, sign: float, decay: float, num_data: float
) -> tuple[Tensor, Tensor]:
    """(lr, decay, sigma) as a launch takes them, and sigma in float64: the formulas of the host, in its arithmetic and order."""
    lr = group["lr"].to(theta.device, torch.float64)
    # a division by a number would be a multiplication by its inverse
    sigma = (2 * lr * group["temperature"] / torch.full_like(lr, num_data)).sqrt()
    scalars = torch.stack([sign * lr, torch.full_like(lr, sign * decay), sigma])
    return scalars.to(torch.float64 if theta.dtype == torch.float64 else torch.float32), sigma
