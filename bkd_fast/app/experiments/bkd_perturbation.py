"""MNIST under Gaussian noise: as accuracy falls, does the student's uncertainty rise, or does it stay sure of itself?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

import bkd_fast as bkd
from bkd_fast.app import config, models
from bkd_fast.app import data as app_data
from bkd_fast.app.data import Batches
from bkd_fast.app.experiments.common import (
    dropout_logits,
    fit,
    logits_of,
    nll,
    predictive,
    run_chains,
    sample_posterior,
)
from bkd_fast.app.experiments.experiment import Experiment, Figures

SHAPE, CLASSES = (1, 28, 28), 10
BODY = 3  # modules of a student before its head: flatten, linear, ReLU
E1 = 8e-8  # the authors' step on the log posterior; lr = N e1


@dataclass(frozen=True)
class Settings:
    """train, test: images; sigmas: of the noise, in grey levels of [0, 1].

    head_epochs, head_draws: of the chains of the head alone, at the authors' step; all others count in steps.
    """

    train: int = 60_000
    test: int = 10_000
    sigmas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    teacher: tuple[int, ...] = (1200, 1200)
    student: tuple[int, ...] = (200, 200)
    teacher_epochs: int = 120
    student_epochs: int = 120
    batch_size: int = 200
    prior_strength: float = 5.0
    temperature: float = 2.0
    prior_precision: float = 100.0
    chains: int = 2
    burn_in: int = 10_000
    thin: int = 100
    num_draws: int = 240
    head_epochs: int = 80
    head_draws: int = 480
    members: int = 5
    dropout: float = 0.1
    passes: int = 100


def network(hidden: tuple[int, ...], seed: int, dropout: float = 0.0) -> nn.Module:
    """A multilayer perceptron; dropout after every hidden layer."""
    layers: list[nn.Module] = []
    for layer in models.build(config.MLP(hidden=list(hidden)), SHAPE, CLASSES, seed):
        layers += [layer, nn.Dropout(dropout)] if dropout and isinstance(layer, nn.ReLU) else [layer]
    return nn.Sequential(*layers)


def scores_of(summary: bkd.PosteriorPredictive, labels: Tensor) -> dict[str, float]:
    """Of one set of test images; all but accuracy and nll are means over them. The mutual information of one draw is 0."""
    mean = summary.mean.double()
    confidence, predicted = mean.max(1)
    accuracy = float((predicted == labels).double().mean())
    return {
        "accuracy": accuracy,
        "confidence": float(confidence.mean()),
        "over-confidence": float(confidence.mean()) - accuracy,
        "mean deviance": float(summary.mean_deviance.mean()),
        "mutual information": float(summary.mutual_information.mean()),
        "nll": nll(mean, labels),
    }


def sample_top(
    student: nn.Module,
    loss: bkd.KDLoss,
    training: tuple[Tensor, ...],
    tests: list[Tensor],
    settings: Settings,
    seed: int,
) -> tuple[list[bkd.PosteriorPredictive], dict[str, float]]:
    """The authors' mode: chains of the head alone, from the trained one, at their constant step and without a Gaussian prior."""
    layers = list(student.children())
    body, head = nn.Sequential(*layers[:BODY]), nn.Sequential(*layers[BODY:])
    x, y, teacher = training
    batches = Batches(logits_of(body, x), y, teacher, batch_size=settings.batch_size, shuffle_seed=seed)
    chains = bkd.StackedModule(head, settings.chains)
    sampler = bkd.SGLD(chains.named_parameters(), len(x) * E1, num_data=len(x), chains=settings.chains, seed=seed)
    return run_chains(
        chains,
        sampler,
        loss,
        batches,
        [logits_of(body, x) for x in tests],
        burn_in=0,
        thin=max(1, settings.head_epochs * len(batches) // settings.head_draws),
        num_draws=settings.head_draws,
    )


def run(seed: int, settings: Settings) -> Figures:
    images = app_data.load(config.Data(name="mnist", train_size=settings.train, test_size=settings.test), seed)
    x, y = images.train_x, images.train_y
    noise = torch.randn(images.test_x.shape, generator=torch.Generator().manual_seed(seed))
    tests = [images.test_x + sigma * noise for sigma in settings.sigmas]
    order = Batches(x, y, batch_size=settings.batch_size, shuffle_seed=seed)
    teacher = network(settings.teacher, seed, dropout=0.2)
    fit(teacher, order, functional.cross_entropy, epochs=settings.teacher_epochs, lr=1e-3)
    logits = logits_of(teacher, x)

    def batches(number: int) -> Batches:
        return Batches(x, y, logits, batch_size=settings.batch_size, shuffle_seed=100 * seed + number)

    def trained(loss: Callable[..., Tensor], number: int, dropout: float = 0.0) -> nn.Module:
        start = network(settings.student, 100 * seed + number, dropout)
        decay = settings.prior_precision / settings.train
        return fit(start, batches(number), loss, epochs=settings.student_epochs, lr=2e-3, weight_decay=decay)

    loss, alone = bkd.KDLoss(settings.prior_strength, settings.temperature), bkd.KDLoss(0.0)
    members = [trained(loss, number) for number in range(settings.members)]
    unaided = [trained(alone, 50 + number) for number in range(settings.chains)]
    dropped = trained(loss, 30, settings.dropout)
    found: dict[str, Mapping[str, float]] = {}

    def add(name: str, summaries: Sequence[bkd.PosteriorPredictive], chains: dict[str, float] | None = None) -> None:
        """The rows of one method; what is known of its chains stands in the first."""
        rows = [scores_of(summary, images.test_y) for summary in summaries]
        for sigma, row in zip(settings.sigmas, rows, strict=True):
            rise = {"rise": row["mean deviance"] - rows[0]["mean deviance"]}
            found[f"{name}, sigma = {sigma:g}"] = row | rise | (chains if chains and row is rows[0] else {})

    for name, model in (("teacher", teacher), ("KD", members[0])):
        add(name, [predictive(logits_of(model, rows)[None]) for rows in tests])
    for name, starts, energy in (("BKD", members[: settings.chains], loss), ("Bayes, no teacher", unaided, alone)):
        posteriors, figures = sample_posterior(
            starts,
            energy,
            batches(20),
            tests,
            num_data=settings.train,
            prior_precision=settings.prior_precision,
            burn_in=settings.burn_in,
            thin=settings.thin,
            num_draws=settings.num_draws,
            seed=seed,
        )
        add(name, posteriors, figures)
    posteriors, figures = sample_top(members[0], loss, (x, y, logits), tests, settings, seed)
    add("BKD, head alone", posteriors, figures)
    add("MC dropout", [predictive(dropout_logits(dropped, rows, settings.passes, seed)) for rows in tests])
    add("ensemble", [predictive(torch.stack([logits_of(member, rows) for member in members])) for rows in tests])
    return found


FULL = Settings()
DEVIATIONS = (
    "MNIST and multilayer perceptrons of the paper's sizes for MNIST (2.4M to 0.2M parameters) in the place of Fashion-MNIST, "
    "ResNet-50 and a CNN. No figures are published for the perturbation: compare the order of methods as sigma grows.",
    "Noise N(0, sigma^2) is added to grey levels of [0, 1] of test images and not clipped; it is the same for all methods. "
    "The paper's range of sigma is not known to us.",
    "BKD: all parameters, SGHMC at the step size of suggest_lr, two chains from two KD students, Gaussian prior. BKD, head "
    "alone: the authors' later code as far as we know it: lambda = 5, T = 2, the layers after the first one sampled on fixed "
    "features by SGLD at the constant step e1 = 8e-8 (lr = N e1), no Gaussian prior, from the student that Adam trained; 120 "
    "epochs of Adam, 80 of sampling, 480 draws in full. Two chains of one start in the place of one; batch size and widths "
    "are ours.",
    "KD, MC dropout and the ensemble have the same teacher, lambda, T and prior as BKD; Bayes has no teacher.",
    "over-confidence: mean largest probability - accuracy. rise: mean deviance - that without noise. R-hat is that of images "
    "without noise; stationarity (docs/samplers.md) is 1 for chains that diffuse freely.",
    "quick has 10,000 training images, smaller networks and shorter chains, those of the head too: as N is in the authors' "
    "lr, it explores less than full.",
)
EXPERIMENTS = (
    Experiment(
        name="bkd-perturbation",
        title="Bayesian knowledge distillation under Gaussian noise on the images: uncertainty against accuracy",
        source="Fang, Chen, Xie, Wang and Zhang, Bayesian Knowledge Distillation (ICML 2024), perturbed test images",
        comparison="same method, other data",
        run=run,
        full=FULL,
        quick=replace(
            FULL,
            train=10_000,
            test=1000,
            teacher=(400, 400),
            student=(100, 100),
            teacher_epochs=20,
            student_epochs=20,
            burn_in=1000,
            thin=50,
            num_draws=30,
            head_epochs=20,
            head_draws=50,
            members=3,
            passes=50,
        ),
        tiny=replace(
            FULL,
            train=200,
            test=40,
            sigmas=(0.0, 1.0),
            teacher=(20,),
            student=(10, 10),
            teacher_epochs=1,
            student_epochs=1,
            batch_size=50,
            burn_in=2,
            thin=1,
            num_draws=6,
            head_epochs=2,
            head_draws=6,
            members=2,
            passes=4,
        ),
        columns=(
            "accuracy",
            "confidence",
            "over-confidence",
            "mean deviance",
            "rise",
            "mutual information",
            "nll",
            "r_hat",
            "stationarity",
        ),
        deviations=DEVIATIONS,
    ),
)
