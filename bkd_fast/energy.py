"""The energies of training batches and their gradients, as a chain meets them: what the loop and `suggest_lr` measure with."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from bkd_fast.ops.topk import TopKLogits
from bkd_fast.samplers.sampler import Sampler, rates_of
from bkd_fast.sharding import local, sum_of_parts
from bkd_fast.stacked import StackedModule

Batch: TypeAlias = tuple[Tensor, Tensor | None, Tensor | TopKLogits | None]  # x, target, teacher logits
BatchNorm: TypeAlias = Literal["freeze", "recalibrate", "train"]

COORDINATES = 4096  # per group, on which the gradient's variance is measured


class BatchEnergy:
    """The energies of training batches and their gradients, as a chain meets them.

    Args:
        student, sampler, loss_fn, loader, teacher, batch_norm: as in `sample`.

    Raises:
        ValueError: a loss that is no mean, a sampler that holds parameters of others.
    """

    def __init__(
        self,
        student: nn.Module,
        sampler: Sampler,
        loss_fn: Callable[..., Tensor],
        loader: Iterable[Any],
        teacher: nn.Module | None = None,
        batch_norm: BatchNorm = "freeze",
    ) -> None:
        reduction = getattr(loss_fn, "reduction", "mean")
        if reduction != "mean":
            raise ValueError(
                f"loss_fn.reduction = {reduction!r}: must be 'mean'; num_data scales the mean loss to the data set"
            )
        _check_owned(student, sampler)
        self.chains = _chains_of(student, sampler, batch_norm)
        self.student, self.sampler, self.loss_fn, self.teacher = student, sampler, loss_fn, teacher
        self.batch_norm = batch_norm
        self.device = sampler.param_groups[0]["params"][0].device
        self.batches = endless(loader)

    @contextmanager
    def modes_put_back(self) -> Iterator[None]:
        """The teacher in eval mode; at the end the modes of both networks are as before."""
        models = [self.student] if self.teacher is None else [self.student, self.teacher]
        modes = [(module, module.training) for model in models for module in model.modules()]
        try:
            if self.teacher is not None:
                self.teacher.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training

    def enter_sampling_mode(self) -> None:
        self.student.train()
        if self.batch_norm == "freeze":
            for module in batch_norms(self.student):
                module.eval()

    def unpack(self, batch: Any) -> Batch:
        """A batch of the loader, on the device."""
        if not isinstance(batch, (tuple, list)) or not 2 <= len(batch) <= 3:
            form = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
            raise ValueError(f"train_loader yields a {form}: must yield (x, target) or (x, target, teacher_logits)")
        moved: list[Any] = [None if t is None else t.to(self.device, non_blocking=True) for t in batch]
        return moved[0], moved[1], moved[2] if len(moved) == 3 else None

    def complete(self, batch: Any) -> Batch:
        """A batch on the device, with the teacher's logits where it has none."""
        x, target, teacher_logits = self.unpack(batch)
        if teacher_logits is None and self.teacher is not None:
            with torch.no_grad():
                teacher_logits = self.teacher(x)
        return x, target, teacher_logits

    def backward(self, batch: Any) -> Tensor:
        """Gradients of the mean energy of one batch, with chains of each one's; returns the energy, their mean."""
        x, target, teacher_logits = self.complete(batch)
        self.student.zero_grad(set_to_none=True)
        energy = self.loss_fn(self.student(x), target, teacher_logits)
        graph = any(group.get("gamma", False) for group in self.sampler.param_groups)  # PSGLD differentiates once more
        (energy * self.chains).backward(create_graph=graph)  # type: ignore[no-untyped-call]
        return energy.detach()

    def gradient_variance(self, batches: int) -> list[float]:
        """Variance of the gradient between so many batches at the present parameters: for each group the mean over (a few
        thousand) coordinates, each times the sampler's metric; NaN for a group without gradients. Leaves no gradients."""
        groups = self.sampler.param_groups
        drawn: list[list[Tensor]] = [[] for _ in groups]
        for _ in range(batches):
            self.backward(next(self.batches))
            moving = [[p for p in group["params"] if p.grad is not None] for group in groups]
            for found, parameters in zip(drawn, moving, strict=True):
                if parameters:
                    found.append(_coordinates([local(p.grad) for p in parameters]))
        variances = []
        for found, parameters in zip(drawn, moving, strict=True):
            if found:
                metric = _coordinates([metric_of(self.sampler, p) for p in parameters])
                coordinates = torch.stack(found)
                # of a sharded group there may be none here, which var() warns of
                here = metric * coordinates.var(dim=0) if len(metric) else metric
                total, count = sum_of_parts(torch.stack([here.sum(), here.new_tensor(len(here))]), parameters[0])
                variances.append(float(total / count))
            else:
                variances.append(math.nan)
        self.student.zero_grad(set_to_none=True)
        return variances

    def check_loss(self) -> None:
        """The errors that a loss records on a GPU, where raising at once would wait for the device."""
        check = getattr(self.loss_fn, "check", None)
        if check is not None:
            check()


def _check_owned(student: nn.Module, sampler: Sampler) -> None:
    sampled = {id(p) for group in sampler.param_groups for p in group["params"]}
    owned = sum(id(parameter) in sampled for parameter in student.parameters())
    if owned < len(sampled):
        raise ValueError(
            f"sampler holds {len(sampled)} parameters, of which {owned} are the student's: must hold only its own"
        )


def _chains_of(student: nn.Module, sampler: Sampler, batch_norm: BatchNorm) -> int:
    """How many chains move at once; each has a network of its own in a `StackedModule`."""
    chains = {group["chains"] for group in sampler.param_groups}
    stacked = student.chains if isinstance(student, StackedModule) else 1
    if chains != {stacked}:
        raise ValueError(
            f"sampler has chains = {sorted(chains)} and student {stacked}: must agree, the student being a StackedModule"
        )
    if stacked > 1 and batch_norm == "recalibrate" and any(True for _ in batch_norms(student)):
        raise ValueError(f"batch_norm = 'recalibrate' with {stacked} chains: must be 'freeze' or 'train'")
    return stacked


def noise_share_of(sampler: Sampler, group: dict[str, Any], variance: float) -> float:
    """`Health.noise_share` of a group whose lr and temperature are positive, from its `BatchEnergy.gradient_variance`."""
    return sampler.effective_lr(group) * float(group["num_data"]) * variance / (2 * temperature_of(group))


def metric_of(sampler: Sampler, parameter: Tensor) -> Tensor:
    """The sampler's preconditioner at every coordinate of a parameter that is here; without one, a 1 that takes no memory."""
    metric = sampler.metric(parameter)
    return torch.ones((), device=parameter.device).expand_as(local(parameter)) if metric is None else local(metric)


def temperature_of(group: dict[str, Any]) -> float:
    """The temperature of a group, the mean of its chains'."""
    return float(rates_of(group)[1].mean())


def _coordinates(tensors: list[Tensor]) -> Tensor:
    """The same few thousand coordinates of a group's tensors at every call, spread evenly."""
    total = sum(t.numel() for t in tensors)
    stride = max(1, total // COORDINATES)
    return torch.cat([t.detach().flatten()[::stride].double() for t in tensors])


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader, which is run through again and again."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "train_loader is empty (or an iterator that was used up): must yield batches on every pass"
            )


def batch_norms(model: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    return (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats)
