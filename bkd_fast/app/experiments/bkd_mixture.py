"""MNIST with four teachers of unequal quality: a student of their mixture prior, of their mean, or of one of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

import bkd_fast as bkd
from bkd_fast.app import config, models
from bkd_fast.app import data as app_data
from bkd_fast.app.data import Batches
from bkd_fast.app.experiments.common import fit, logits_of, nll, predictive, sample_posterior
from bkd_fast.app.experiments.experiment import Experiment, Figures

SHAPE, CLASSES = (1, 28, 28), 10
TEACHERS = ("many images", "few images", "random labels", "exchanged labels")
EXCHANGED = (0, 1, 2, 5, 9, 3, 6, 7, 8, 4)  # 3 and 5, 4 and 9


@dataclass(frozen=True)
class Settings:
    """train: images of each teacher but the second; few: of the second; own: of the student, labelled; all apart.

    random: share of the third teacher's labels that are drawn at random.
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
    random: float = 0.6
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
        "nll": nll(mean, labels),
    }


def entropy_weights(logits: Tensor) -> Tensor:
    """(rows, teachers) the published weights of a mixture, of logits (rows, teachers, classes)."""
    entropy = torch.special.entr(logits.double().softmax(2)).sum(2)
    weights: Tensor = 1 - entropy / entropy.sum(1, keepdim=True)
    return weights / weights.sum(1, keepdim=True)


def train_teachers(images: app_data.Images, settings: Settings, seed: int) -> list[nn.Module]:
    """Teachers of images that follow the student's own, each of its own images; the last two have wrong labels."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [settings.train, settings.few, settings.train, settings.train]
    xs, ys = (torch.split(part[settings.own :], sizes) for part in (images.train_x, images.train_y))
    any_label = torch.randint(CLASSES, ys[2].shape, generator=generator)
    at_random = torch.rand(len(ys[2]), generator=generator) < settings.random
    labels = [ys[0], ys[1], torch.where(at_random, any_label, ys[2]), torch.tensor(EXCHANGED)[ys[3]]]
    teachers = []
    for number, (x, y) in enumerate(zip(xs, labels, strict=True)):
        network = models.build(config.MLP(hidden=list(settings.teacher)), SHAPE, CLASSES, 100 * seed + number)
        order = Batches(x, y, batch_size=settings.batch_size, shuffle_seed=100 * seed + number)
        teachers.append(fit(network, order, functional.cross_entropy, epochs=settings.teacher_epochs, lr=1e-3))
    return teachers


def run(seed: int, settings: Settings) -> Figures:
    size = settings.own + 3 * settings.train + settings.few
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
    ways: dict[str, tuple[bkd.KDLoss, Tensor]] = {
        "labels alone": (bkd.KDLoss(0.0), mean),
        **{f"{name} alone": (kd(), logits[:, number]) for number, name in enumerate(TEACHERS)},
        "mixture, entropy weights": (kd(TeachersSecond, prior="mixture"), logits),
        "mixture, uniform weights": (kd(TeachersSecond, prior="mixture", mixture_weights="uniform"), logits),
        "mean probabilities": (kd(), mean),
    }
    for name, (loss, labels) in ways.items():
        batches = Batches(x, y, labels, batch_size=settings.batch_size, shuffle_seed=seed)
        starts = [
            fit(
                models.build(config.MLP(hidden=list(settings.student)), SHAPE, CLASSES, 1000 + 100 * seed + chain),
                batches,
                loss,
                epochs=settings.student_epochs,
                lr=2e-3,
                weight_decay=settings.prior_precision / settings.own,
            )
            for chain in range(settings.chains)
        ]
        mode = scores_of(predictive(logits_of(starts[0], images.test_x)[None]), images.test_y)
        (posterior,), figures = sample_posterior(
            starts,
            loss,
            batches,
            [images.test_x],
            num_data=settings.own,
            prior_precision=settings.prior_precision,
            burn_in=settings.burn_in,
            thin=settings.thin,
            num_draws=settings.num_draws,
            seed=seed,
        )
        found[name] = {f"KD: {figure}": value for figure, value in mode.items()} | figures
        found[name] |= {f"BKD: {figure}": value for figure, value in scores_of(posterior, images.test_y).items()}
    return found


FULL = Settings(10_000, 500, 5000, 10_000, teacher_epochs=30, student_epochs=40, burn_in=4000, thin=50, num_draws=200)
EXPERIMENTS = (
    Experiment(
        name="bkd-mixture",
        title="Bayesian knowledge distillation from several teachers, some of them wrong: a mixture of priors, or their mean",
        source="Fang, Chen, Xie, Wang and Zhang, Bayesian Knowledge Distillation (ICML 2024), the prior of several teachers",
        comparison="same method, other data",
        run=run,
        full=FULL,
        quick=replace(
            FULL,
            train=5000,
            few=300,
            own=1000,
            test=2000,
            teacher_epochs=15,
            student_epochs=30,
            burn_in=1000,
            thin=20,
            num_draws=60,
        ),
        tiny=Settings(60, 30, 40, 40, 1, 1, 2, 1, 6, teacher=(8,), student=(8,), batch_size=20),
        columns=(
            "accuracy",
            "nll",
            "weight",
            *(f"{kind}: {figure}" for kind in ("KD", "BKD") for figure in ("accuracy", "nll")),
            "r_hat",
            "stationarity",
        ),
        deviations=(
            "MNIST, teachers and students are ours; no figures of several teachers are quoted.",
            "Every network has images of its own. The first teacher has many, the second few. The other two have as many as the "
            f"first, but {Settings.random:.0%} of the third's labels are drawn at random, which makes it unsure, and in the "
            "fourth's 3 and 5, and 4 and 9, are exchanged, and it stays sure of itself. The student has few labels, all true.",
            "weight: the mean entropy weight of a teacher over the student's images. Mean probabilities: one Dirichlet prior "
            "whose teacher is the mean of the four.",
            "Accuracy and nll of teachers stand in columns of their own; KD is the student that Adam trained, BKD the posterior "
            "mean of two SGHMC chains from such students, of all parameters, with a Gaussian prior.",
            "quick has fewer images, smaller teachers' and students' training and shorter chains.",
        ),
    ),
)
