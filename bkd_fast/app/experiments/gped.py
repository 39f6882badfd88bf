"""Posterior expectation distillation on MNIST: students of a chain's predictive and entropy, on masked and foreign images."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bkd_fast as bkd
from bkd_fast.app import config
from bkd_fast.app import data as app_data
from bkd_fast.app.data import Batches
from bkd_fast.app.experiments.common import EVALUATION_BATCH, HealthOf, logits_of, nll, seeded
from bkd_fast.app.experiments.datasets import OTHERS, unlike_mnist
from bkd_fast.app.experiments.experiment import Experiment
from bkd_fast.methods.dirichlet import Dirichlet, dirichlet_uncertainty
from bkd_fast.methods.posterior_expectation import (
    Estimator,
    Expectation,
    ExpectedEntropy,
    PosteriorExpectation,
    Predictive,
    Uncertainty,
    uncertainty,
)
from bkd_fast.posterior.metrics import ood_detection, rank_correlation, risk_coverage

CLASSES = 10
SIDES = {0: "0", 5: ".03", 10: ".13", 15: ".29", 20: ".51"}  # of the masks, in pixels -> their share of 28 x 28


@dataclass(frozen=True)
class Settings:
    """Of the paper, but for `sides` and the images.

    sides: of the square masks, in pixels.
    train, test, others: images; others of each foreign set.
    hidden: widths of the chain's network and the students.
    eta: step size on the log posterior; lr = train * eta / 2.
    entropy_thin, predictive_thin: steps of the chain from one step of a student to the next (the paper's H); the second a
        multiple of the first.
    evaluate: draws from one that is evaluated on the test images to the next.
    """

    sides: tuple[int, ...] = (0, 5, 10, 15, 20)
    train: int = 60_000
    test: int = 10_000
    others: int = 10_000
    hidden: tuple[int, ...] = (400, 400)
    eta: float = 4e-6
    prior_precision: float = 10.0
    batch_size: int = 100
    burn_in: int = 1000
    steps: int = 1_000_000
    entropy_thin: int = 10
    predictive_thin: int = 100
    evaluate: int = 100
    student_lr: float = 1e-3
    input_noise: float = 1e-3

    @property
    def updates(self) -> int:
        """Steps of a student of the predictive."""
        return (self.steps - self.burn_in) // self.predictive_thin


FULL = Settings()
# of 10,000 images, at the same lr: the prior, whose pull is lr * prior_precision / train, then sets the weights within the run
QUICK = replace(FULL, sides=(0, 15), train=10_000, eta=2.4e-5, steps=20_000, predictive_thin=10, evaluate=10)
TINY = replace(
    FULL, train=500, test=100, others=50, hidden=(20,), eta=2e-4, burn_in=50, steps=250, predictive_thin=20, evaluate=5
)


# ---- the data ----


class Problem(NamedTuple):
    """Masked MNIST, in rows of 784 grey levels, centred."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: Tensor


def masked(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Images (N, 1, H, W) with a square of zeros each, wholly inside, anywhere with equal probability."""

    def band(size: int) -> Tensor:
        """(N, size): what each square covers of a side."""
        begin = torch.randint(size - side + 1, (len(images), 1), generator=generator)
        place = torch.arange(size)
        return (place >= begin) & (place < begin + side)

    height, width = images.shape[-2:]
    return images.masked_fill(band(height)[:, None, :, None] & band(width)[:, None, None, :], 0)


def load(seed: int, side: int, settings: Settings) -> Problem:
    which = config.Data(name="mnist", train_size=settings.train, test_size=settings.test)
    images = app_data.load(which, seed)
    generator = torch.Generator().manual_seed(seed)
    train, test = (masked(x + images.mean, side, generator).flatten(1) for x in (images.train_x, images.test_x))
    mean = train.mean(0)
    return Problem(train - mean, images.train_y, test - mean, images.test_y, mean)


# ---- the chain and its students ----


def network(settings: Settings, outputs: int, seed: int) -> nn.Module:
    def make() -> nn.Module:
        hidden: list[nn.Module] = []
        for before, after in pairwise((784, *settings.hidden)):
            hidden += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(settings.hidden[-1], outputs))

    return seeded(make, seed)


def student(
    seed: int, problem: Problem, settings: Settings, estimator: Estimator, thin: int, *expectations: Expectation
) -> PosteriorExpectation:
    """A student of its own; all start alike and see the points in the same order."""
    model = network(settings, sum(head.width(CLASSES) for head in expectations), 1000 + seed)
    return PosteriorExpectation(
        model,
        torch.optim.Adam(model.parameters(), lr=settings.student_lr),
        problem.train_x,
        expectations,
        num_classes=CLASSES,
        estimator=estimator,
        every=thin // settings.entropy_thin,
        batch_size=settings.batch_size,
        input_noise=settings.input_noise,
        seed=seed,
    )


def run_chain(
    seed: int, problem: Problem, tests: list[Tensor], students: list[PosteriorExpectation], settings: Settings
) -> tuple[list[bkd.PosteriorPredictive], dict[str, float]]:
    """The paper's SGLD from random parameters, with its students: the predictive of every set of test inputs, and its health."""
    model = network(settings, CLASSES, seed)
    lr = settings.train * settings.eta / 2
    sampler = bkd.SGLD(
        model.parameters(), lr, num_data=settings.train, prior_precision=settings.prior_precision, seed=seed
    )
    batches = Batches(problem.train_x, problem.train_y, batch_size=settings.batch_size, shuffle_seed=seed)
    posteriors = [bkd.PosteriorPredictive(len(x), CLASSES) for x in tests]
    figures = HealthOf()
    for draw in bkd.sample(
        model,
        sampler,
        bkd.KDLoss(0.0),
        batches,
        burn_in=settings.burn_in,
        thin=settings.entropy_thin,
        num_draws=(settings.steps - settings.burn_in) // settings.entropy_thin,
        progress=False,
        callbacks=[*students, figures],
    ):
        if (draw.index + 1) % settings.evaluate == 0:
            for posterior, x in zip(posteriors, tests, strict=True):
                posterior.update_logits(logits_of(draw.model, x))
    return posteriors, {"stationarity": figures.health.stationarity[0]}


def said(student: PosteriorExpectation, x: Tensor) -> tuple[Tensor, ...]:
    """The readings of all rows, one for each head."""
    parts = zip(*(student.predict(rows) for rows in torch.split(x, EVALUATION_BATCH)), strict=True)
    return tuple(torch.cat(rows) for rows in parts)


# ---- masks ----


def run_masks(seed: int, settings: Settings) -> dict[str, dict[str, float]]:
    found = {}
    for side in settings.sides:
        problem = load(seed, side, settings)
        running = student(seed, problem, settings, "running", settings.predictive_thin, Predictive())
        memoryless = student(seed, problem, settings, "memoryless", settings.predictive_thin, Predictive())
        entropy = student(seed, problem, settings, "running", settings.entropy_thin, ExpectedEntropy())
        (posterior,), health = run_chain(seed, problem, [problem.test_x], [running, memoryless, entropy], settings)
        error = said(entropy, problem.test_x)[0] - posterior.expected_entropy
        found[f"r = {SIDES[side]}"] = {
            "teacher NLL": nll(posterior.mean, problem.test_y),
            "U_o NLL": nll(said(running, problem.test_x)[0], problem.test_y),
            "U_s NLL": nll(said(memoryless, problem.test_x)[0], problem.test_y),
            "U_o entropy MAE": float(error.abs().mean()),
            "mean entropy": float(posterior.expected_entropy.mean()),
            **health,
        }
    return found


# ---- foreign images ----


def scores_of(
    probs: Tensor, labels: Tensor, scores: list[Uncertainty], reference: Uncertainty | None = None
) -> dict[str, float]:
    """Accuracy, NLL, and what each kind of uncertainty is worth; `scores` are those of the test images, then of each of OTHERS.

    Returns:
        For foreign images the AUROC; for errors the area under the risk-coverage curve of the total; and the rank
        correlation with a reference's scores of the test images.
    """
    wrong = (probs.argmax(1) != labels).double()
    found = {
        "accuracy": 1 - float(wrong.mean()),
        "NLL": nll(probs, labels),
        "AURC": risk_coverage(scores[0].total, wrong).area,
    }
    if reference is not None:
        for kind in ("total", "knowledge"):
            found[f"rank of {kind}"] = rank_correlation(getattr(scores[0], kind), getattr(reference, kind))
    for name, foreign in zip(OTHERS, scores[1:], strict=True):
        for kind in ("total", "knowledge"):
            detection = ood_detection(getattr(scores[0], kind), getattr(foreign, kind))
            found[f"{name} {kind}"] = detection.auroc
    return found


def run_foreign(seed: int, settings: Settings) -> Mapping[str, Mapping[str, float]]:
    problem = load(seed, 0, settings)
    foreign = unlike_mnist(settings.others)
    tests = [problem.test_x, *(x.flatten(1) - problem.mean for x in foreign.values())]
    thin = settings.predictive_thin
    predictive = student(seed, problem, settings, "running", thin, Predictive())
    memoryless = student(seed, problem, settings, "memoryless", thin, Predictive())
    entropy = student(seed, problem, settings, "running", settings.entropy_thin, ExpectedEntropy())
    joint = student(seed, problem, settings, "running", thin, Predictive(), ExpectedEntropy())
    dirichlet = student(seed, problem, settings, "running", thin, Dirichlet())
    students = [predictive, memoryless, entropy, joint, dirichlet]
    posteriors, health = run_chain(seed, problem, tests, students, settings)

    means = [posterior.mean for posterior in posteriors]
    own = [Uncertainty(p.predictive_entropy, p.expected_entropy, p.mutual_information) for p in posteriors]
    two = [(said(predictive, x)[0], said(entropy, x)[0]) for x in tests]
    one = [said(joint, x) for x in tests]
    alphas = [said(dirichlet, x)[0] for x in tests]
    error = two[0][1] - posteriors[0].expected_entropy
    return {
        "ensemble": scores_of(means[0], problem.test_y, own) | health,
        "students (U_o)": {
            **scores_of(two[0][0], problem.test_y, [uncertainty(*both) for both in two], own[0]),
            "entropy MAE": float(error.abs().mean()),
        },
        "student (U_s)": {"NLL": nll(said(memoryless, problem.test_x)[0], problem.test_y)},
        "joint student (U_o)": scores_of(one[0][0], problem.test_y, [uncertainty(*both) for both in one], own[0]),
        "Dirichlet (EnD^2)": scores_of(
            alphas[0] / alphas[0].sum(1, keepdim=True),
            problem.test_y,
            [dirichlet_uncertainty(a) for a in alphas],
            own[0],
        ),
    }


SOURCE = "Vadera, Cobb, Jalaian and Marlin, Generalized Bayesian Posterior Expectation Distillation, UAI 2020"
DEVIATIONS = (
    f"quick is not the paper's protocol, and its numbers are not to be compared with the published ones: {QUICK.train:,} images "
    f"to learn and distil from, not {FULL.train:,}; a chain of {QUICK.steps:,} steps at the same lr of "
    f"{QUICK.train * QUICK.eta / 2:.2g}, not of {FULL.steps:,}; students that take {QUICK.updates:,} steps, one every "
    f"{QUICK.predictive_thin}, not {FULL.updates:,} (predictive, every {FULL.predictive_thin}) and "
    f"{(FULL.steps - FULL.burn_in) // FULL.entropy_thin:,} (entropy, every {FULL.entropy_thin})",
    f"masks are squares of {', '.join(map(str, SIDES))} pixels of zeros, at a random place of each image, fixed; images are "
    "centred by the mean of the training images; the paper's own placement and scaling are not known to us",
    f"the ensemble is every {FULL.evaluate * FULL.entropy_thin:,}th step's draw in full, every "
    f"{QUICK.evaluate * QUICK.entropy_thin}th's in quick",
    "the distillation points come in a new permutation for each epoch",
    "stationarity is ours (bkd_fast.Health): 0 for a chain that has arrived, 1 for one whose weights diffuse freely",
)


def _published(teacher: float, running: float, memoryless: float, error: float) -> dict[str, float]:
    return {"teacher NLL": teacher, "U_o NLL": running, "U_s NLL": memoryless, "U_o entropy MAE": error}


EXPERIMENTS = (
    Experiment(
        name="gped-mnist",
        title="Posterior expectation distillation: students of a chain on masked MNIST",
        source=f"{SOURCE}, MNIST, fully connected network, masking rate r",
        comparison="same data, same protocol",
        quick_comparison="same method, other data",
        run=run_masks,
        full=FULL,
        quick=QUICK,
        tiny=TINY,
        columns=("teacher NLL", "U_o NLL", "U_s NLL", "U_o entropy MAE", "mean entropy", "stationarity"),
        published={
            "r = 0": _published(0.052, 0.054, 0.082, 0.016),
            "r = .03": _published(0.081, 0.094, 0.133, 0.023),
            "r = .13": _published(0.155, 0.186, 0.240, 0.043),
            "r = .29": _published(0.360, 0.398, 0.471, 0.086),
            "r = .51": _published(1.010, 1.033, 1.107, 0.106),
        },
        deviations=(
            *DEVIATIONS,
            f"quick has r = {' and '.join(SIDES[side] for side in QUICK.sides)} only, for want of time",
            "mean entropy is ours: that of the ensemble on the test images, to measure the error by",
        ),
    ),
    Experiment(
        name="gped-ood",
        title="Posterior expectation distillation: AUROC of foreign images by a student's uncertainty",
        source=f"{SOURCE}, MNIST against KMNIST and notMNIST, fully connected network",
        comparison="same data, same protocol",
        quick_comparison="same method, other data",
        run=run_foreign,
        full=FULL,
        quick=QUICK,
        tiny=TINY,
        columns=(
            "accuracy",
            "NLL",
            "entropy MAE",
            *(f"{name} {kind}" for name in OTHERS for kind in ("total", "knowledge")),
            "rank of total",
            "rank of knowledge",
            "AURC",
            "stationarity",
        ),
        published={
            "ensemble": {"NLL": 0.052, "kmnist total": 0.929, "kmnist knowledge": 0.976, "notmnist knowledge": 0.990},
            "students (U_o)": {
                "NLL": 0.054,
                "entropy MAE": 0.016,
                "kmnist total": 0.867,
                "kmnist knowledge": 0.928,
                "notmnist knowledge": 0.762,
            },
            "student (U_s)": {"NLL": 0.082},
        },
        deviations=(
            *DEVIATIONS,
            "the joint student (one trunk, two heads) and the Dirichlet (Malinin et al., ICLR 2020) learn from the draws of the "
            "predictive student; we know of no published figures of theirs",
            "rank of: Spearman's correlation with the ensemble's uncertainty over the test images. AURC: of errors, ranked by "
            "total uncertainty. Both are ours",
            "NLL and entropy MAE are published for masks of rate 0, which this chain is: the first row of gped-mnist",
            "notMNIST is another drawing of letters than the paper's may be: the 10,000 test images of notMNIST-to-MNIST",
        ),
    ),
)
