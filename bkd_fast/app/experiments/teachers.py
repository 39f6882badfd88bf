"""Ten Gaussians of known class probabilities: which teacher's labels make the best student?"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import bkd_fast as bkd
from bkd_fast.app.data import Batches
from bkd_fast.app.experiments.common import fit, logits_of, seeded
from bkd_fast.app.experiments.datasets import Gaussians
from bkd_fast.app.experiments.experiment import Experiment, Figures
from bkd_fast.methods.bayesian_teacher import BayesianTeacher
from bkd_fast.methods.brier import brier_loss

KINDS = ("CE", "Brier", "Bayesian")
CLASSES, DIMENSIONS = Gaussians.classes, Gaussians.dimensions
STUDENTS: dict[str, tuple[Callable[[], nn.Module], float]] = {  # and the prior precision of their parameters
    "linear": (lambda: nn.Linear(DIMENSIONS, CLASSES), 54.0),  # the variance of the true weights, m / 6
    "8 units": (lambda: nn.Sequential(nn.Linear(DIMENSIONS, 8), nn.ReLU(), nn.Linear(8, CLASSES)), 10.0),
}


@dataclass(frozen=True)
class Settings:
    """sizes: training points, the teacher's and the student's; rows: test inputs; steps: of a fit."""

    sizes: tuple[int, ...] = (300, 1000, 4000)
    rows: int = 4000
    hidden: int = 100  # units of a teacher
    steps: int = 2000
    batch_size: int = 100
    prior_strength: float = 5.0
    # of a teacher's parameters: under 54 the prior's logits have the spread of the true ones, about 2
    precisions: tuple[float, ...] = (1.7, 5.4, 17.0, 54.0, 170.0)
    burn_in: int = 4000
    thin: int = 50
    num_draws: int = 200


def scores_of(log_probs: Tensor, truth: Tensor) -> dict[str, float]:
    """In expectation over the true p(y given x); (rows, classes) logarithms of predicted and true probabilities."""
    p, predicted = truth.exp(), log_probs.double().log_softmax(1)
    return {
        "accuracy": float(p.gather(1, predicted.argmax(1, keepdim=True)).mean()),
        "KL(true, predicted)": float((p * (truth - predicted)).sum(1).mean()),
    }


def posterior_logits(
    start: nn.Module, x: Tensor, y: Tensor, inputs: Tensor, precision: float, settings: Settings, seed: int
) -> Tensor:
    """Log probabilities (len(inputs), classes) of the mean over one SGHMC chain from a trained teacher, which moves."""
    batches = Batches(x, y, batch_size=settings.batch_size, shuffle_seed=seed)
    loss = bkd.KDLoss(0.0)
    sampler = bkd.SGHMC(start.named_parameters(), 1e-3, num_data=len(x), prior_precision=precision, seed=seed)
    lr = bkd.suggest_lr(start, sampler, loss, batches, noise_share=0.05).lr
    for group in sampler.param_groups:
        group["lr"] = lr
    labels = BayesianTeacher([inputs], num_rows=len(inputs), num_classes=CLASSES)
    for _ in bkd.sample(
        start,
        sampler,
        loss,
        batches,
        burn_in=settings.burn_in,
        thin=settings.thin,
        num_draws=settings.num_draws,
        progress=False,
        callbacks=[labels],
    ):
        pass
    return labels.logits


def train(
    make: Callable[[], nn.Module],
    loss: Callable[..., Tensor],
    precision: float,
    data: tuple[Tensor, ...],
    settings: Settings,
    seed: int,
) -> nn.Module:
    """A network of (x, targets...) by about `settings.steps` steps of Adam, whose weight decay is the Gaussian prior."""
    rows = len(data[0])
    epochs = -(-settings.steps // (rows // min(settings.batch_size, rows)))
    batches = Batches(*data, batch_size=settings.batch_size, shuffle_seed=seed)
    return fit(seeded(make, seed), batches, loss, epochs=epochs, lr=2e-3, weight_decay=precision / rows)


def teacher_logits(
    kind: str, precision: float, x: Tensor, y: Tensor, inputs: Tensor, settings: Settings, seed: int
) -> Tensor:
    """(len(inputs), classes) of a teacher of one of `KINDS` with a Gaussian prior, trained on x and y."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(DIMENSIONS, settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, CLASSES))

    loss = brier_loss if kind == "Brier" else functional.cross_entropy
    teacher = train(make, loss, precision, (x, y), settings, seed)
    if kind == "Bayesian":
        return posterior_logits(teacher, x, y, inputs, precision, settings, seed)
    return logits_of(teacher, inputs)


def chosen_precision(kind: str, x: Tensor, y: Tensor, settings: Settings, seed: int) -> float:
    """The precision whose teacher of four fifths of the points has the smallest log loss on the others."""
    cut = 4 * len(x) // 5
    losses = {
        precision: float(
            functional.cross_entropy(
                teacher_logits(kind, precision, x[:cut], y[:cut], x[cut:], settings, seed), y[cut:]
            )
        )
        for precision in settings.precisions
    }
    return min(losses, key=lambda precision: losses[precision])


def run_seed(seed: int, settings: Settings) -> Figures:
    problem = Gaussians(seed)
    data_x, data_y = problem.draw(max(settings.sizes))
    test_x, _ = problem.draw(settings.rows)
    truth = problem.log_probs(test_x).double()
    found = {"Bayes' rule": scores_of(truth, truth)}
    for size in settings.sizes:
        x, y = data_x[:size], data_y[:size]
        both = torch.cat([x, test_x])
        teachers = {"exact": problem.log_probs(both)}
        for kind in KINDS:
            precision = chosen_precision(kind, x, y, settings, seed)
            teachers[kind] = teacher_logits(kind, precision, x, y, both, settings, seed)
            found[f"{size}: {kind} teacher"] = scores_of(teachers[kind][size:], truth) | {"precision": precision}
        for student, (make, precision) in STUDENTS.items():
            alone = train(make, functional.cross_entropy, precision, (x, y), settings, seed)
            found[f"{size}: {student}, no teacher"] = scores_of(logits_of(alone, test_x), truth)
            for name, logits in teachers.items():
                loss = bkd.KDLoss(settings.prior_strength)
                taught = train(make, loss, precision, (x, y, logits[:size]), settings, seed)
                found[f"{size}: {student}, {name} teacher"] = scores_of(logits_of(taught, test_x), truth)
    return found


EXPERIMENTS = (
    Experiment(
        "teachers-gaussians",
        "Teachers by cross entropy, by the Brier score and by their posterior's mean, against known class probabilities",
        "No paper's experiment; the Bayesian teacher is that of Balan, Rathod, Murphy and Welling, Bayesian dark knowledge "
        "(NIPS 2015), and nothing is quoted",
        "same method, other data",
        run_seed,
        full=Settings(),
        quick=Settings(sizes=(300, 1000), rows=2000, steps=1000, burn_in=1000, thin=20, num_draws=100),
        tiny=Settings((60,), 40, 8, 4, 20, precisions=(17.0, 54.0), burn_in=2, thin=1, num_draws=3),
        columns=("accuracy", "KL(true, predicted)", "precision"),
        deviations=(
            "A problem of our own: ten Gaussians in 30 dimensions whose log odds are linear in x, Bayes accuracy .6; accuracies "
            "and divergences are expectations under the truth. Students see their teacher's points, labels included.",
            "All teachers are of one network. The precision of each one's Gaussian prior is that of five under which a teacher "
            "of four fifths of the points has the smallest log loss on the rest. One prior for all would weigh more in the Brier "
            "teacher, as the Brier loss is smaller than a log loss.",
            "quick: sizes 300 and 1,000, one chain of 3,000 steps.",
        ),
        seeds=5,
    ),
)
