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
    prior_precision: float = (
        54.0  # of a teacher's parameters: its prior's logits then have the spread of the true ones, about 2
    )
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


def posterior_logits(start: nn.Module, x: Tensor, y: Tensor, test_x: Tensor, settings: Settings, seed: int) -> Tensor:
    """Log probabilities (N + rows, classes) of the mean over one SGHMC chain from a trained teacher, which moves."""
    batches = Batches(x, y, batch_size=settings.batch_size, shuffle_seed=seed)
    loss = bkd.KDLoss(0.0)
    sampler = bkd.SGHMC(
        start.named_parameters(), 1e-3, num_data=len(x), prior_precision=settings.prior_precision, seed=seed
    )
    lr = bkd.suggest_lr(start, sampler, loss, batches, noise_share=0.05).lr
    for group in sampler.param_groups:
        group["lr"] = lr
    labels = BayesianTeacher([x, test_x], num_rows=len(x) + len(test_x), num_classes=CLASSES)
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


def run_seed(seed: int, settings: Settings) -> Figures:
    problem = Gaussians(seed)
    data_x, data_y = problem.draw(max(settings.sizes))
    test_x, _ = problem.draw(settings.rows)
    truth = problem.log_probs(test_x).double()
    found = {"Bayes' rule": scores_of(truth, truth)}
    for size in settings.sizes:
        x, y = data_x[:size], data_y[:size]
        both = torch.cat([x, test_x])
        epochs = -(-settings.steps // (size // min(settings.batch_size, size)))

        def train(
            make: Callable[[], nn.Module],
            loss: Callable[..., Tensor],
            precision: float,
            *labels: Tensor,
            data: tuple[Tensor, Tensor] = (x, y),
            epochs: int = epochs,
        ) -> nn.Module:
            batches = Batches(*data, *labels, batch_size=settings.batch_size, shuffle_seed=seed)
            return fit(seeded(make, seed), batches, loss, epochs=epochs, lr=2e-3, weight_decay=precision / len(data[0]))

        def teacher() -> nn.Module:
            return nn.Sequential(nn.Linear(DIMENSIONS, settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, CLASSES))

        plain = train(teacher, functional.cross_entropy, settings.prior_precision)
        teachers = {
            "CE": logits_of(plain, both),
            "Brier": logits_of(train(teacher, brier_loss, settings.prior_precision), both),
            "Bayesian": posterior_logits(plain, x, y, test_x, settings, seed),
            "exact": problem.log_probs(both),
        }
        for kind, (make, precision) in STUDENTS.items():
            alone = train(make, functional.cross_entropy, precision)
            found[f"{size}: {kind}, no teacher"] = scores_of(logits_of(alone, test_x), truth)
        for name, logits in teachers.items():
            if name != "exact":
                found[f"{size}: {name} teacher"] = scores_of(logits[size:], truth)
            for kind, (make, precision) in STUDENTS.items():
                student = train(make, bkd.KDLoss(settings.prior_strength), precision, logits[:size])
                found[f"{size}: {kind}, {name} teacher"] = scores_of(logits_of(student, test_x), truth)
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
        tiny=Settings((60,), 40, 8, 4, 20, burn_in=2, thin=1, num_draws=3),
        columns=("accuracy", "KL(true, predicted)"),
        deviations=(
            "A problem of our own: ten Gaussians in 30 dimensions whose log odds are linear in x, Bayes accuracy .6; accuracies "
            "and divergences are expectations under the truth. Students see their teacher's points, labels included.",
            "All teachers have one network and one prior, under which logits spread as the true ones do. The Brier loss is "
            "smaller than a log loss, so that the prior weighs more in it.",
            "quick: sizes 300 and 1,000, one chain of 3,000 steps.",
        ),
        seeds=5,
    ),
)
