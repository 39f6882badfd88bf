"""MNIST: does a student answer as its teacher does on balls around test images, found by attack and certified by intervals?"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import bkd_fast as bkd
from bkd_fast.app import config, models
from bkd_fast.app import data as app_data
from bkd_fast.app.data import Batches
from bkd_fast.app.experiments.common import fit, logits_of
from bkd_fast.app.experiments.experiment import Experiment, Figures
from bkd_fast.methods.bounds import Box, ball
from bkd_fast.methods.faithful import FaithfulLoss, PosteriorGap, attack, faithfulness

RADII = (0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Settings:
    """train, test: images; rows: test images with a ball; eps: its radius in training, of grey levels in [0, 1]."""

    train: int = 60_000
    test: int = 10_000
    rows: int = 1000
    teacher_channels: tuple[int, ...] = (16, 32)  # none: a perceptron
    teacher_hidden: tuple[int, ...] = (100,)
    student_hidden: tuple[int, ...] = (100,)
    teacher_epochs: int = 20
    student_epochs: int = 20
    batch_size: int = 100
    eps: float = 0.1
    steps: int = 10  # of the attack in training
    prior_strength: float = 5.0  # lambda, and beta
    prior_precision: float = 10.0
    burn_in: int = 2000
    thin: int = 100
    num_draws: int = 30
    attack_steps: int = 40
    restarts: int = 3


class Problem:
    """The images of a seed, their range, and batches (x, y, ...) of the training part."""

    def __init__(self, seed: int, settings: Settings) -> None:
        which = config.Data(name="mnist", train_size=settings.train, test_size=settings.test)
        self.images = app_data.load(which, seed)
        self.seed, self.settings = seed, settings
        self.range = {"lower": -self.images.mean, "upper": 1 - self.images.mean}
        self.rows = self.images.test_x[: settings.rows]

    def batches(self, *more: Tensor) -> Batches:
        x, y = self.images.train_x, self.images.train_y
        return Batches(x, y, *more, batch_size=self.settings.batch_size, shuffle_seed=self.seed)

    def ball(self, eps: float) -> Box:
        """Around the rows that are looked at."""
        return ball(self.rows, eps, **self.range)

    def build(self, which: config.Model, number: int) -> nn.Module:
        return models.build(which, self.images.shape, self.images.num_classes, 100 * self.seed + number)

    def accuracy(self, logits: Tensor) -> float:
        return float((logits.argmax(-1) == self.images.test_y).double().mean())


def train_teacher(problem: Problem, robust: bool) -> nn.Module:
    """On cross entropy, or on that of the worst points of the ball (Madry et al., ICLR 2018)."""
    settings = problem.settings
    hidden = list(settings.teacher_hidden)
    channels = list(settings.teacher_channels)
    teacher = problem.build(config.CNN(channels=channels, hidden=hidden) if channels else config.MLP(hidden=hidden), 0)

    def robust_loss(_: Tensor, target: Tensor, x: Tensor) -> Tensor:
        def cross_entropy(z: Tensor) -> Tensor:
            return functional.cross_entropy(teacher(z), target, reduction="none")

        box = ball(x, settings.eps, **problem.range)
        return cross_entropy(attack(cross_entropy, x, box, steps=settings.steps).points).mean()

    loss, batches = (
        (robust_loss, problem.batches(problem.images.train_x))
        if robust
        else (functional.cross_entropy, problem.batches())
    )
    return fit(teacher, batches, loss, epochs=settings.teacher_epochs, lr=2e-3)


def sample_from(
    start: nn.Module,
    loss: Callable[..., Tensor],
    batches: Iterable[Any],
    teacher: nn.Module | None,
    gaps: PosteriorGap,
    problem: Problem,
) -> bkd.StackedModule:
    """The draws of one SGHMC chain from a trained student, which moves; the step size is `suggest_lr`'s."""
    settings = problem.settings
    sampler = bkd.SGHMC(
        start.named_parameters(),
        1e-3,
        num_data=settings.train,
        prior_precision=settings.prior_precision,
        seed=problem.seed,
    )
    lr = bkd.suggest_lr(start, sampler, loss, batches, teacher=teacher, noise_share=0.05).lr
    for group in sampler.param_groups:
        group["lr"] = lr
    draws = bkd.sample(
        start,
        sampler,
        loss,
        batches,
        teacher=teacher,
        burn_in=settings.burn_in,
        thin=settings.thin,
        num_draws=settings.num_draws,
        progress=False,
        callbacks=[gaps],
    )
    return bkd.StackedModule([deepcopy(draw.model).eval() for draw in draws]).requires_grad_(False)


def scores_of(student: nn.Module, teacher: nn.Module, problem: Problem) -> dict[str, float]:
    """Accuracy on all test images; means over the rows of what `faithfulness` finds."""
    if isinstance(student, bkd.StackedModule):
        networks = [student.chain(k) for k in range(student.chains)]
        logits = torch.stack([logits_of(n, problem.images.test_x) for n in networks]).softmax(-1).mean(0)
    else:
        logits = logits_of(student, problem.images.test_x)
    scores = {"accuracy": problem.accuracy(logits)}
    settings = problem.settings
    for eps in RADII:
        found = faithfulness(
            student, teacher, problem.rows, problem.ball(eps), steps=settings.attack_steps, restarts=settings.restarts
        )
        scores["gap"] = float(found.gap.mean())
        scores["agreement"] = float(found.agrees.double().mean())
        scores[f"gap found {eps:g}"] = float(found.gap_found.mean())
        scores[f"gap certified {eps:g}"] = float(found.gap_certified.mean())
        scores[f"agreement found {eps:g}"] = float(found.agrees_found.double().mean())
        scores[f"agreement certified {eps:g}"] = float(found.agrees_certified.double().mean())
    return scores


def run_seed(seed: int, settings: Settings) -> Figures:
    problem = Problem(seed, settings)
    which = config.MLP(hidden=list(settings.student_hidden))
    x = problem.images.train_x
    training = partial(
        fit, epochs=settings.student_epochs, lr=2e-3, weight_decay=settings.prior_precision / settings.train
    )
    found: dict[str, dict[str, float]] = {}
    for kind in ("plain", "robust"):
        teacher = train_teacher(problem, kind == "robust").requires_grad_(False)
        found[f"{kind} teacher"] = {"accuracy": problem.accuracy(logits_of(teacher, problem.images.test_x))}
        students: dict[str, nn.Module] = {}
        students["CE"] = training(problem.build(which, 1), problem.batches(), functional.cross_entropy)
        distillation = bkd.KDLoss(settings.prior_strength)
        labelled = problem.batches(logits_of(teacher, x))
        kd = students["KD"] = training(problem.build(which, 1), labelled, distillation)

        def faithful_to(student: nn.Module, teacher: nn.Module = teacher) -> FaithfulLoss:
            return FaithfulLoss(
                student, teacher, beta=settings.prior_strength, eps=settings.eps, steps=settings.steps, **problem.range
            )

        student = problem.build(which, 1)
        students["faithful KD"] = training(student, problem.batches(x), faithful_to(student))
        chain, faithful_chain = deepcopy(kd), deepcopy(student)
        for name, start, loss, batches, asked in (
            ("BKD", chain, distillation, labelled, None),
            ("faithful BKD", faithful_chain, faithful_to(faithful_chain), problem.batches(x), nn.Identity()),
        ):
            gaps = PosteriorGap(
                teacher,
                problem.rows,
                problem.ball(settings.eps),
                steps=settings.attack_steps,
                restarts=settings.restarts,
            )
            students[f"{name}, posterior mean"] = sample_from(start, loss, batches, asked, gaps, problem)
            found[f"{kind}: {name}, its draws"] = {
                f"gap found {settings.eps:g}": float(gaps.found.mean.mean()),
                "95 % of draws": float(gaps.found.quantile(0.95).mean()),
            }
        found |= {f"{kind}: {name}": scores_of(model, teacher, problem) for name, model in students.items()}
    return found


EXPERIMENTS = (
    Experiment(
        "faithful-mnist",
        "MNIST: students that follow their teacher on balls around the inputs",
        "Lamb et al., Faithful Knowledge Distillation (arXiv:2306.04431), whose figures are not quoted: this is a reconstruction "
        "from its abstract",
        "same method, other data",
        run_seed,
        full=Settings(),
        quick=Settings(
            train=10_000,
            test=2000,
            rows=200,
            teacher_channels=(),
            teacher_hidden=(200, 200),
            student_hidden=(64,),
            teacher_epochs=6,
            student_epochs=8,
            steps=4,
            burn_in=200,
            thin=10,
            num_draws=20,
            attack_steps=20,
            restarts=1,
        ),
        tiny=Settings(
            train=200,
            test=50,
            rows=10,
            teacher_channels=(),
            teacher_hidden=(8,),
            student_hidden=(8,),
            teacher_epochs=1,
            student_epochs=1,
            batch_size=20,
            steps=1,
            burn_in=2,
            thin=1,
            num_draws=2,
            attack_steps=2,
            restarts=1,
        ),
        columns=(
            "accuracy",
            "gap",
            *(f"{what} {eps:g}" for eps in RADII for what in ("gap found", "gap certified")),
            "95 % of draws",
            *(f"agreement found {eps:g}" for eps in RADII),
            *(f"agreement certified {eps:g}" for eps in RADII[:2]),
        ),
        deviations=(
            "Networks, training and radii are ours: the abstract names MNIST among the data and no settings.",
            "Certificates are intervals, propagated through both networks; nothing is trained for them.",
            "quick: 10,000 training images, perceptrons (teacher 784-200-200-10, student 784-64-10), short training, attacks "
            "of 4 steps in it and of 20 from 2 starts in the test, on 200 images; chains of 400 steps, not far from where "
            "they start.",
        ),
    ),
)
