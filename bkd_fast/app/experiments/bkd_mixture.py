"""MNIST with three teachers of unequal quality: a student of their mixture prior, of their mean, or of one of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import bkd_fast as bkd
from bkd_fast.app import config, models
from bkd_fast.app import data as app_data
from bkd_fast.app.data import Batches
from bkd_fast.app.experiments.common import fit, logits_of, predictive, sample_posterior
from bkd_fast.app.experiments.experiment import Experiment, Figures

SHAPE, CLASSES = (1, 28, 28), 10
TEACHERS = ("many images", "few images", "wrong labels")


@dataclass(frozen=True)
class Settings:
    """train: images of the first and the third teacher; few: of the second; own: of the student, labelled; all apart.

    wrong: share of the third teacher's labels that are drawn at random.
    """

    train: int
    few: int
    own: int
    test: int
    teacher_epochs: int
    student_epochs: int
    burn_in: int
    thin: int
    num_draws: int
    wrong: float = 0.6
    teacher: tuple[int, ...] = (200,)
    student: tuple[int, ...] = (50,)
    batch_size: int = 100
    prior_strength: float = 5.0
    temperature: float = 1.0
    prior_precision: float = 100.0
    chains: int = 2


class TeachersSecond(bkd.KDLoss):
    """`KDLoss` of teacher logits (rows, teachers, classes), as batches of rows hold them."""

    def forward(self, logits: Tensor, target: Tensor | None = None, teacher_logits: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(logits, target, None if teacher_logits is None else teacher_logits.transpose(0, 1))


def scores_of(summary: bkd.PosteriorPredictive, labels: Tensor) -> dict[str, float]:
    mean = summary.mean.double()
    return {
        "accuracy": float((mean.argmax(1) == labels).double().mean()),
        "nll": float(functional.nll_loss(mean.clamp_min(1e-30).log(), labels)),
    }


def entropy_weights(logits: Tensor) -> Tensor:
    """(rows, teachers) the published weights of a mixture, of logits (rows, teachers, classes)."""
    entropy = torch.special.entr(logits.double().softmax(2)).sum(2)
    weights = 1 - entropy / entropy.sum(1, keepdim=True)
    return weights / weights.sum(1, keepdim=True)


def train_teachers(images: app_data.Images, settings: Settings, seed: int) -> list[nn.Module]:
    """Teachers of images that follow the student's own, each of its own images; the last one's labels are partly wrong."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [settings.own, settings.train, settings.few, settings.train]
    parts = list(zip(images.train_x.split(sizes), images.train_y.split(sizes), strict=True))[1:]
    x, y = parts[-1]
    random = torch.randint(CLASSES, y.shape, generator=generator)
    parts[-1] = x, torch.where(torch.rand(len(y), generator=generator) < settings.wrong, random, y)
    teachers = []
    for number, (x, y) in enumerate(parts):
        network = models.build(config.MLP(hidden=list(settings.teacher)), SHAPE, CLASSES, 100 * seed + number)
        order = Batches(x, y, batch_size=settings.batch_size, shuffle_seed=100 * seed + number)
        teachers.append(fit(network, order, functional.cross_entropy, epochs=settings.teacher_epochs, lr=1e-3))
    return teachers


def run(seed: int, settings: Settings) -> Figures:
    size = settings.own + 2 * settings.train + settings.few
    images = app_data.load(config.Data(name="mnist", train_size=size, test_size=settings.test), seed)
    x, y = images.train_x[: settings.own], images.train_y[: settings.own]
    teachers = train_teachers(images, settings, seed)
    logits = torch.stack([logits_of(teacher, x) for teacher in teachers], 1)
    weights = entropy_weights(logits / settings.temperature).mean(0)
    found: dict[str, dict[str, float]] = {}
    for number, teacher in enumerate(teachers):
        scores = scores_of(predictive(logits_of(teacher, images.test_x)[None]), images.test_y)
        found[f"teacher: {TEACHERS[number]}"] = scores | {"weight": float(weights[number])}

    def kd(kind: type[bkd.KDLoss] = bkd.KDLoss, **settings_of_prior: str) -> bkd.KDLoss:
        return kind(settings.prior_strength, settings.temperature, **settings_of_prior)  # type: ignore[arg-type]

    mean = logits.double().softmax(2).mean(1).log().float()
    chosen = int((logits.argmax(2) == y[:, None]).sum(0).argmax())
    ways: dict[str, tuple[bkd.KDLoss, Tensor]] = {
        "labels alone": (bkd.KDLoss(0.0), mean),
        **{f"{name} alone": (kd(), logits[:, number]) for number, name in enumerate(TEACHERS)},
        "mixture, entropy weights": (kd(TeachersSecond, prior="mixture"), logits),
        "mixture, uniform weights": (kd(TeachersSecond, prior="mixture", mixture_weights="uniform"), logits),
        "mean probabilities": (kd(), mean),
    }
    return found
