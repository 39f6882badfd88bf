"""suggest_lr: a learning rate from the minibatch gradient's variance and the energy's curvature at the present parameters."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bkd_fast.energy import Batch, BatchEnergy, metric_of, noise_share_of, temperature_of
from bkd_fast.errors import NonFiniteError
from bkd_fast.samplers.sampler import Sampler
from bkd_fast.samplers.settings import is_zero

LARGEST_STEP = 0.5  # lr' l on the largest curvature l: SGLD's variance is then at most 4/3 of the posterior's
CURVATURE_BATCHES = 4  # fixed batches over which curvatures are averaged
LANCZOS_STEPS = 20
TRACE_PROBES = 8


@dataclass(frozen=True)
class StepSize:
    """A learning rate for a sampler, and what follows from it.

    Attributes:
        lr: for every parameter group.
        effective_lr: lr' of the slowest group: the lr of the SGLD that diffuses as fast (`Sampler.effective_lr`).
        limit: what keeps lr from being larger, the gradient noise or the largest curvature.
        noise_share: lr' N v / (2 T) of each group at this lr, as `Health` reports it.
        gradient_variance: v of each group: the minibatch gradient's variance, mean over coordinates; NaN without gradients.
        largest_curvature: l, the largest eigenvalue of the Hessian of the mean loss plus prior.
        mean_curvature: the mean eigenvalue.
        mixing_steps: 1 / (lr' mean_curvature), the steps in which the chain forgets along a direction of the mean curvature;
            infinite where that is not positive.
        prior_mixing_steps: 1 / (lr' tau / N), along directions that the loss does not see; infinite without a prior.

    For a sampler with a metric G the curvatures are those of sqrt(G) H sqrt(G), v and tau / N are means of G v and G tau / N.
    """

    lr: float
    effective_lr: float
    limit: Literal["noise_share", "curvature"]
    noise_share: list[float]
    gradient_variance: list[float]
    largest_curvature: float
    mean_curvature: float
    mixing_steps: float
    prior_mixing_steps: float

    def __str__(self) -> str:
        limit = "the minibatch gradient's noise" if self.limit == "noise_share" else "the largest curvature"
        shares = ", ".join(f"{share:.2g}" for share in self.noise_share)
        return (
            f"lr = {self.lr:.3g}, limited by {limit}\n"
            f"  noise share       {shares}\n"
            f"  largest curvature {self.largest_curvature:.3g}, lr' l = {self.effective_lr * self.largest_curvature:.2g}\n"
            f"  mean curvature    {self.mean_curvature:.3g}, mixing in {self.mixing_steps:.2g} steps\n"
            f"  prior alone       mixing in {self.prior_mixing_steps:.2g} steps"
        )


def suggest_lr(
    student: nn.Module,
    sampler: Sampler,
    loss_fn: Callable[..., Tensor],
    train_loader: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    noise_share: float = 0.1,
    batches: int = 16,
) -> StepSize:
    """The largest learning rate whose minibatch noise and discretisation are small, at the student's present parameters.

    Call it after the warm start: far from the mode both limits are others. lr' = min(2 T noise_share / (N v), 0.5 / l), with v
    the variance of the minibatch gradient per coordinate and l the largest curvature of the mean loss plus prior, and lr the
    learning rate that gives `sampler` this effective one (for samplers with momentum the limit on l is a cautious one).

    v is measured as `Health` measures it, so it is good to some sqrt(2 / ((batches - 1) D)) for D coordinates of like variance.
    Curvatures come from differences of gradients over 4 fixed batches, with every module in eval mode: l from 20 Lanczos steps,
    a lower bound that is usually good to a percent, the mean from 8 random directions. That is some 220 gradients of a batch.
    The student is afterwards as it was: parameters, gradients, modes and buffers. The sampler takes no step and its lr is not
    changed.

    Args:
        student, sampler, loss_fn, train_loader, teacher: as in `sample`. Temperature, prior and momentum are the sampler's; its
            lr is not read.
        noise_share: positive; the chain will sample at about temperature T (1 + noise_share).
        batches: from which v is measured, at least 2.

    Returns:
        StepSize: `print` it.

    Raises:
        TypeError: batches is no int; 16-bit parameters, whose gradients are too coarse to take differences.
        ValueError: noise_share or batches out of range; a temperature of 0; `step_in_backward`; no parameter that gets a
            gradient; neither gradient noise nor curvature; and what `sample` raises for its arguments.
        NonFiniteError: gradients that are not finite.
    """
    if not (math.isfinite(noise_share) and noise_share > 0):
        raise ValueError(f"noise_share = {noise_share}: must be positive and finite")
    if isinstance(batches, bool) or not isinstance(batches, int):
        raise TypeError(f"batches = {batches!r}: must be an int")
    if batches < 2:
        raise ValueError(f"batches = {batches}: must be at least 2, for a variance")
    _check_groups(sampler)
    energy = BatchEnergy(student, sampler, loss_fn, train_loader, teacher)
    with energy.modes_put_back(), _put_back(student):
        energy.enter_sampling_mode()
        variances = energy.gradient_variance(batches)
        student.eval()
        curvature = _Curvature(energy, [energy.complete(next(energy.batches)) for _ in range(CURVATURE_BATCHES)])
        largest, mean = curvature.largest(), curvature.mean()
    energy.check_loss()
    if not all(map(math.isfinite, [largest, mean, *(v for v in variances if not math.isnan(v))])):
        raise NonFiniteError(
            "gradients at the student's present parameters are not finite: train it first, with a smaller lr"
        )
    return _step_size(sampler, noise_share, variances, largest, mean)


def _check_groups(sampler: Sampler) -> None:
    for index, group in enumerate(sampler.param_groups):
        if is_zero(group["temperature"]):
            raise ValueError(
                f"temperature = {group['temperature']} of parameter group {index}: must be positive, its noise is what the "
                "gradient's is compared with; make a CyclicalSchedule afterwards"
            )
        if group["step_in_backward"]:
            raise ValueError(
                f"step_in_backward = True of parameter group {index}: a backward pass would move it; must be False here"
            )
        for parameter in group["params"]:
            if parameter.dtype.itemsize < 4:
                raise TypeError(
                    f"parameter group {index} has a parameter of {parameter.dtype}: must be float32 or float64, for "
                    "differences of gradients"
                )


def _step_size(sampler: Sampler, noise_share: float, variances: list[float], largest: float, mean: float) -> StepSize:
    groups = sampler.param_groups
    by_noise = [
        2 * temperature_of(group) * noise_share / (group["num_data"] * variance) if variance > 0 else math.inf
        for group, variance in zip(groups, variances, strict=True)
    ]
    by_curvature = LARGEST_STEP / largest if largest > 0 else math.inf
    wanted = [min(limit, by_curvature) for limit in by_noise]
    if min(wanted) == math.inf:
        raise ValueError(
            "the energy of train_loader's batches has neither gradient noise nor curvature: any lr will do"
        )
    lrs = [_lr_for(sampler, group, limit) for group, limit in zip(groups, wanted, strict=True)]
    slowest = min(range(len(groups)), key=lambda index: lrs[index])
    lr = lrs[slowest]
    at_lr = [{**group, "lr": lr} for group in groups]
    effective = min(sampler.effective_lr(group) for group in at_lr)
    pull = min(_prior_curvature(sampler, group) for group in groups)
    return StepSize(
        lr=lr,
        effective_lr=effective,
        limit="noise_share" if by_noise[slowest] < by_curvature else "curvature",
        noise_share=[noise_share_of(sampler, g, v) for g, v in zip(at_lr, variances, strict=True)],
        gradient_variance=variances,
        largest_curvature=largest,
        mean_curvature=mean,
        mixing_steps=1 / (effective * mean) if mean > 0 else math.inf,
        prior_mixing_steps=1 / (effective * pull) if pull > 0 else math.inf,
    )


def _lr_for(sampler: Sampler, group: dict[str, Any], effective: float) -> float:
    """The lr at which a group has this effective one: a fixed point, reached at once where one is a multiple of the other."""
    if effective == math.inf:
        return math.inf
    lr = effective
    for _ in range(
        64
    ):  # for BAOAB with little friction one is as the root of the other, and the error halves each time
        lr *= effective / sampler.effective_lr({**group, "lr": lr})
    return lr


def _prior_curvature(sampler: Sampler, group: dict[str, Any]) -> float:
    """tau / N of a group, times the mean of the metric."""
    metric = sum(float(metric_of(sampler, p).sum(dtype=torch.float64)) for p in group["params"])
    coordinates: int = sum(p.numel() for p in group["params"])
    return _decay(group) * metric / coordinates


def _decay(group: dict[str, Any]) -> float:
    return float(group["weight_decay"] or group["prior_precision"] / group["num_data"])


@contextmanager
def _put_back(student: nn.Module) -> Iterator[None]:
    """The student's gradients and buffers are as before at the end."""
    gradients = [(parameter, parameter.grad) for parameter in student.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in student.buffers()]
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for buffer, value in buffers:
            buffer.copy_(value)


class _Curvature:
    """The Hessian of the mean energy plus prior over fixed batches, seen by its products with vectors.

    Products are central differences of gradients, because a fused loss has no second derivative. The coordinates are those in
    which the sampler's metric G is 1, so the matrix is sqrt(G) H sqrt(G); only parameters that get a gradient count. Leaves
    gradients.
    """

    def __init__(self, energy: BatchEnergy, batches: list[Batch]) -> None:
        self.energy, self.batches = energy, batches
        energy.backward(batches[0])
        moving = [(p, g) for g in energy.sampler.param_groups for p in g["params"] if p.grad is not None and p.numel()]
        if not moving:
            raise ValueError("sampler has no parameter that gets a gradient from loss_fn: must have one")
        self.parameters = [parameter for parameter, _ in moving]
        self.signs = [-1.0 if group["maximize"] else 1.0 for _, group in moving]
        self.decays = [_decay(group) for _, group in moving]
        self.roots = [metric_of(energy.sampler, parameter).sqrt() for parameter in self.parameters]
        self.values = [parameter.detach().clone() for parameter in self.parameters]
        self.size = sum(value.numel() for value in self.values)
        # A change by the root of the rounding error, relative to the parameters: rounding and the third derivative then count
        # little both.
        norm = math.sqrt(sum(float(value.double().square().sum()) for value in self.values))
        self.change = math.sqrt(max(torch.finfo(p.dtype).eps for p in self.parameters)) * (norm or 1.0)
        self.generator = torch.Generator().manual_seed(0)  # not the global one, which others draw from

    def largest(self) -> float:
        """The largest eigenvalue: that of the Lanczos matrix, from a random vector."""
        vector = self._random(normal=True)
        before, beta = torch.zeros_like(vector), 0.0
        diagonal: list[float] = []
        beside: list[float] = []
        for _ in range(min(LANCZOS_STEPS, self.size)):
            beside.append(beta)
            image = self.product(vector)
            alpha = float(image @ vector)
            image -= alpha * vector + beta * before
            diagonal.append(alpha)
            beta = float(image.norm())
            if not beta > 1e-3 * max(map(abs, diagonal)):  # nothing new but rounding errors; or NaN
                break
            vector, before = image / beta, vector
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        off = torch.tensor(beside[1:], dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
        return float(torch.linalg.eigvalsh(matrix)[-1]) if bool(matrix.isfinite().all()) else math.nan

    def mean(self) -> float:
        """The mean eigenvalue: the mean of z H z / D over random signs z (Hutchinson)."""
        probes = (self._random(normal=False) for _ in range(TRACE_PROBES))
        return sum(float(probe @ self.product(probe)) for probe in probes) / TRACE_PROBES

    def product(self, vector: Tensor) -> Tensor:
        """The matrix times a vector (D,) of norm 1."""
        parts = torch.split_with_sizes(vector, [value.numel() for value in self.values])
        direction = [root * part.to(root).view_as(root) for root, part in zip(self.roots, parts, strict=True)]
        change = self.change / math.sqrt(sum(float(d.double().square().sum()) for d in direction))
        try:
            ahead, behind = self._gradient(direction, change), self._gradient(direction, -change)
        finally:
            self._move(direction, 0.0)
        images = [
            root * (sign * (a - b) / (2 * change) + decay * d)
            for root, sign, decay, a, b, d in zip(
                self.roots, self.signs, self.decays, ahead, behind, direction, strict=True
            )
        ]
        return torch.cat([image.flatten().to(vector) for image in images])

    def _gradient(self, direction: list[Tensor], change: float) -> list[Tensor]:
        """The mean gradient over the batches, where the parameters are changed so far in this direction."""
        self._move(direction, change)
        total = [torch.zeros_like(value) for value in self.values]
        for batch in self.batches:
            self.energy.backward(batch)
            for into, parameter in zip(total, self.parameters, strict=True):
                if parameter.grad is not None:
                    into += parameter.grad
        return [t / len(self.batches) for t in total]

    @torch.no_grad()
    def _move(self, direction: list[Tensor], change: float) -> None:
        for parameter, value, along in zip(self.parameters, self.values, direction, strict=True):
            parameter.copy_(value if change == 0 else value + change * along)

    def _random(self, *, normal: bool) -> Tensor:
        """A random direction (D,) of norm 1: normal, or signs."""
        vector = torch.randn(self.size, generator=self.generator)
        if not normal:
            vector = vector.sign()
        vector /= vector.norm()
        return vector.to(self.values[0])
