"""A small run with checkpoints, to be stopped and killed."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bkd_fast import SGHMC, SGLD, Batches, Callback, Checkpoints, CyclicalSchedule, KDLoss, PosteriorPredictive, sample

ROWS, FEATURES, CLASSES, TEST_ROWS = 60, 4, 3, 23
PHASES = {"warm_start": 7, "burn_in": 6, "thin": 3, "num_draws": 9}


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    return (
        x,
        torch.randint(CLASSES, (ROWS,), generator=generator),
        torch.randn(TEST_ROWS, FEATURES, generator=generator),
    )


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES))


class Slow(Callback):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step(self, record: Any) -> None:
        time.sleep(self.seconds)


class Stop(Callback):
    """Ends the run after so many of its steps, counted in all phases."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, record: Any) -> None:
        if record.step == self.step:
            raise KeyboardInterrupt


def run(
    folder: Path | None, every: int = 5, kind: str = "plain", callbacks: tuple[Callback, ...] = (), **checkpoints: Any
) -> tuple[nn.Module, torch.optim.Optimizer, PosteriorPredictive, Batches]:
    """`folder` None: without checkpoints."""
    x, y, test = data()
    student, batches = network(), Batches(TensorDataset(x, y), 8, seed=3)
    posterior = PosteriorPredictive(TEST_ROWS, CLASSES, track="topk:2", diagnostics=True, traces=True)
    schedule = None
    if kind == "plain":
        sampler = SGLD(student.named_parameters(), 0.05, num_data=ROWS, prior_precision=1.0, seed=4)
        sampler.track_moments(10)
        sampler.track_quantiles(["0.weight"], start=12)
    else:
        means = [torch.ones_like(p) for p in student.parameters()]
        sampler = SGHMC(
            student.named_parameters(), 0.05, num_data=ROWS, prior_precision=1.0, prior_mean=means, momentum=0.5
        )
        schedule = CyclicalSchedule(sampler, 10, exploration=0.5)
    follow = (
        [] if folder is None else [Checkpoints(folder, every=every, posterior=posterior, loader=batches, **checkpoints)]
    )
    loss = KDLoss(0.0)
    chain = sample(
        student, sampler, loss, batches, schedule=schedule, progress=False, callbacks=[*follow, *callbacks], **PHASES
    )
    for draw in chain:
        posterior.update(draw, [test])
    return student, sampler, posterior, batches
