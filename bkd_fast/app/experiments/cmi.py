"""Maximum-CMI teachers (Ye et al., ICLR 2024): students of few examples, of a class that they never see, and of known truth."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

import bkd_fast as bkd
from bkd_fast.app.data import Batches
from bkd_fast.app.experiments.common import fit, logits_of, seeded
from bkd_fast.app.experiments.datasets import Gaussians, cifar10
from bkd_fast.app.experiments.experiment import Experiment, Figures
from bkd_fast.methods.cmi import CMILoss, conditional_mutual_information

ALPHA, TEMPERATURE = 0.9, 4.0  # of the students' loss: .1 CE + .9 KD
# of `run_pictures`, and how each is fine-tuned: whether with the CMI term, and whether with centroids of every epoch
TEACHERS: dict[str, tuple[bool, bool] | None] = {
    "CE teacher": None,
    "maximum CMI, frozen centroids": (True, False),
    "maximum CMI, refreshed centroids": (True, True),
    "fine-tuned by CE alone": (False, False),
}


@dataclass(frozen=True)
class Pictures:
    """train, test: images of CIFAR-10; fractions: of the training images, for students; omitted: classes that they never see."""

    train: int
    test: int
    teacher_epochs: int
    tuning_epochs: int
    student_steps: int
    fractions: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5)
    omitted: tuple[int, ...] = ()
    strength: float = 0.2
    tuning_lr: float = 0.05
    batch_size: int = 100
    teacher_widths: tuple[int, ...] = (32, 64, 128)
    student_widths: tuple[int, ...] = (8, 16, 32)


@dataclass(frozen=True)
class Tuning:
    """Fine-tuning of a teacher on CE - strength CMI: SGD with a cosine learning rate, as the paper has it."""

    strength: float
    epochs: int
    lr: float
    batch_size: int
    refreshed: bool  # centroids every epoch, not once

    def __call__(self, start: nn.Module, make: Callable[[], nn.Module], x: Tensor, y: Tensor, seed: int) -> nn.Module:
        """A fine-tuned copy; `make` gives the network that it is of."""
        teacher = make()
        teacher.load_state_dict(start.state_dict())
        batches = Batches(x, y, batch_size=self.batch_size, shuffle_seed=seed)
        everything = Batches(x, y, batch_size=1000)
        loss = CMILoss(self.strength, 10).refresh_(teacher, everything)
        optimizer = torch.optim.SGD(teacher.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * len(batches))
        for epoch in range(self.epochs):
            if self.refreshed and epoch:
                loss.refresh_(teacher, everything)
            teacher.train()
            for rows, labels in batches:
                optimizer.zero_grad()
                loss(teacher(rows), labels).backward()
                optimizer.step()
                schedule.step()
        return teacher.eval()


def distil(
    student: nn.Module, x: Tensor, y: Tensor, logits: Tensor, steps: int, batch_size: int, seed: int
) -> nn.Module:
    """Train a student in place by .1 CE + .9 KD at T = 4 for about so many steps of Adam."""
    batches = Batches(x, y, logits, batch_size=min(batch_size, len(x)), shuffle_seed=seed)
    loss = bkd.KDLoss.from_hinton(ALPHA, TEMPERATURE)
    return fit(student, batches, loss, epochs=-(-steps // len(batches)), lr=2e-3)


def _accuracy(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(1) == y).double().mean())


# ---- CIFAR-10 ----


def network(widths: tuple[int, ...]) -> nn.Sequential:
    """Blocks of 3x3 convolution, batch norm, ReLU and 2x2 pooling, then the mean over the image and a linear layer."""
    layers: list[nn.Module] = []
    for before, after in pairwise((3, *widths)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def run_pictures(seed: int, settings: Pictures) -> Figures:
    """Accuracy of students on what they have seen little or nothing of, and what their teachers are."""
    x, y, test_x, test_y = cifar10(settings.train, settings.test)
    make = partial(seeded, partial(network, settings.teacher_widths), seed)
    batches = Batches(x, y, batch_size=settings.batch_size, shuffle_seed=seed)
    plain = fit(make(), batches, functional.cross_entropy, epochs=settings.teacher_epochs, lr=2e-3)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    found: dict[str, dict[str, float]] = {}
    for name, tuned in TEACHERS.items():
        teacher = plain
        if tuned:
            with_term, refreshed = tuned
            strength = settings.strength if with_term else 0.0
            tuning = Tuning(strength, settings.tuning_epochs, settings.tuning_lr, settings.batch_size, refreshed)
            teacher = tuning(plain, make, x, y, seed)
        logits, test_logits = logits_of(teacher, x), logits_of(teacher, test_x)
        found[name] = {
            "teacher's accuracy": _accuracy(test_logits, test_y),
            "teacher's CMI": float(conditional_mutual_information(logits, y)),
        }

        def student(rows: Tensor, logits: Tensor = logits) -> Tensor:
            made = seeded(lambda: network(settings.student_widths), 1000 + seed)
            distil(made, x[rows], y[rows], logits[rows], settings.student_steps, settings.batch_size, seed)
            return logits_of(made, test_x)

        for fraction in settings.fractions:
            predicted = student(order[: round(fraction * len(x))])
            found[f"{100 * fraction:g} %: {name}"] = {"accuracy": _accuracy(predicted, test_y)}
        unseen, seen = [], []
        for omitted in settings.omitted:
            predicted = student((y != omitted).nonzero().flatten())
            unseen.append(_accuracy(predicted[test_y == omitted], test_y[test_y == omitted]))
            seen.append(_accuracy(predicted[test_y != omitted], test_y[test_y != omitted]))
        if unseen:
            found[name] |= {"unseen class": sum(unseen) / len(unseen), "seen classes": sum(seen) / len(seen)}
    return found


# ---- known truth ----


@dataclass(frozen=True)
class Known:
    """teacher, student: training points of each; rows: test inputs."""

    teacher: int
    student: int
    rows: int
    teacher_epochs: int
    tuning_epochs: int
    student_steps: int
    strengths: tuple[float, ...] = (0.1, 0.2, 0.4)
    tuning_lr: float = 0.02
    batch_size: int = 200


def run_known(seed: int, settings: Known) -> Figures:
    """Whether more CMI makes teachers better estimates of p(y given x), on ten Gaussians: expectations under the truth."""
    problem = Gaussians(seed)
    x, y = problem.draw(settings.teacher)
    own_x, own_y = problem.draw(settings.student)
    test_x, _ = problem.draw(settings.rows)
    truth = problem.log_probs(test_x).double()
    make = partial(seeded, lambda: nn.Sequential(nn.Linear(30, 200), nn.ReLU(), nn.Linear(200, 10)), seed)
    batches = Batches(x, y, batch_size=settings.batch_size, shuffle_seed=seed)
    plain = fit(make(), batches, functional.cross_entropy, epochs=settings.teacher_epochs, lr=2e-3)
    found = {}
    for strength in (None, 0.0, *settings.strengths):
        name = "CE teacher" if strength is None else f"fine-tuned, strength {strength:g}"
        teacher = plain
        if strength is not None:
            tuning = Tuning(strength, settings.tuning_epochs, settings.tuning_lr, settings.batch_size, refreshed=False)
            teacher = tuning(plain, make, x, y, seed)
        student = seeded(lambda: nn.Linear(30, 10), seed)
        distil(student, own_x, own_y, logits_of(teacher, own_x), settings.student_steps, settings.batch_size, seed)
        found[name] = {
            "teacher's CMI": float(conditional_mutual_information(logits_of(teacher, x), y)),
            "KL(true, teacher)": _divergence(truth, logits_of(teacher, test_x)),
            "KL(true, student)": _divergence(truth, logits_of(student, test_x)),
        }
    found["truth"] = {"teacher's CMI": float(conditional_mutual_information(problem.log_probs(x), y))}
    return found


def _divergence(truth: Tensor, logits: Tensor) -> float:
    return float((truth.exp() * (truth - logits.double().log_softmax(1))).sum(1).mean())


SOURCE = (
    "L. Ye, S. M. Hamidi, R. Tan, E.-H. Yang, *Bayes Conditional Distribution Estimation for Knowledge Distillation Based on "
    "Conditional Mutual Information*, ICLR 2024"
)
PUBLISHED = {0.05: (52.30, 58.02), 0.1: (60.13, 63.75), 0.25: (66.80, 68.03), 0.5: (69.53, 70.11)}
SMALLER = (
    "CIFAR-10 as JPEG in the place of CIFAR-100, and small convolutional networks in the place of ResNet-56 and ResNet-20: "
    "differences between teachers may be compared in sign, accuracies not at all.",
    "Teachers and students are trained by Adam with a cosine learning rate and without augmentation, students for a fixed number "
    "of steps whatever their share of the data. Fine-tuning is the paper's: SGD, lr .05 with a cosine; momentum .9 and weight "
    "decay 5e-4 are ours.",
    "Refreshed centroids are renewed once an epoch (the paper); frozen ones are those of the CE teacher (the released code). "
    "The teacher that is fine-tuned without the term is our control.",
    "`quick` has 4,000 training images and 2,000 test images, `full` all.",
)
EXPERIMENTS = (
    Experiment(
        "cmi-few-shot",
        "Maximum-CMI teachers: students of few examples",
        f"{SOURCE}, few-shot, CIFAR-100, ResNet-56 to ResNet-20",
        "same method, other data",
        run_pictures,
        full=Pictures(50_000, 10_000, 60, 20, 20_000, teacher_widths=(64, 128, 256), student_widths=(16, 32, 64)),
        quick=Pictures(4000, 2000, 20, 8, 400),
        tiny=Pictures(200, 50, 1, 1, 2, (0.5,), batch_size=50, teacher_widths=(4, 8), student_widths=(4, 4)),
        columns=("accuracy", "teacher's accuracy", "teacher's CMI"),
        published={
            f"{100 * fraction:g} %: {name}": {"accuracy": figure / 100}
            for fraction, both in PUBLISHED.items()
            for name, figure in zip(TEACHERS, both, strict=False)
        },
        deviations=SMALLER,
    ),
    Experiment(
        "cmi-zero-shot",
        "Maximum-CMI teachers: a class that the student never sees",
        f"{SOURCE}, zero-shot",
        "same method, other data",
        run_pictures,
        full=Pictures(
            50_000,
            10_000,
            60,
            20,
            20_000,
            (),
            tuple(range(10)),
            teacher_widths=(64, 128, 256),
            student_widths=(16, 32, 64),
        ),
        quick=Pictures(4000, 2000, 20, 8, 600, (), (0, 3, 8)),
        tiny=Pictures(200, 50, 1, 1, 2, (), (0,), batch_size=50, teacher_widths=(4, 8), student_widths=(4, 4)),
        columns=("unseen class", "seen classes", "teacher's accuracy", "teacher's CMI"),
        deviations=(
            *SMALLER,
            "Means over one omitted class after the other: 0, 3 and 8 in `quick`, all ten in `full`.",
        ),
    ),
    Experiment(
        "cmi-known-truth",
        "Maximum-CMI teachers as estimates of known class probabilities",
        f"{SOURCE}, the claim of its title",
        "same method, other data",
        run_known,
        full=Known(20_000, 4000, 4000, 60, 20, 4000, (0.05, 0.1, 0.15, 0.2, 0.25, 0.4, 0.6)),
        quick=Known(4000, 1000, 2000, 20, 10, 600),
        tiny=Known(300, 100, 50, 1, 1, 4, (0.2,), batch_size=50),
        columns=("teacher's CMI", "KL(true, teacher)", "KL(true, student)"),
        deviations=(
            "A problem of our own with exact p(y given x): ten Gaussians in 30 dimensions, Bayes accuracy .6. Nothing was "
            "published for it.",
            "Centroids are frozen; a strength of 0 is fine-tuning by cross entropy alone.",
        ),
        seeds=5,
    ),
)
