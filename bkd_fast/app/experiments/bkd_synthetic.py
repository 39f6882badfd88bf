"""Known class probabilities, linear and not, of two classes and five: do the intervals of Bayesian distillation cover them?"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

import bkd_fast as bkd
from bkd_fast.app.data import Batches
from bkd_fast.app.experiments.common import (
    dropout_logits,
    fit,
    logits_of,
    point_scores,
    predictive,
    sample_posterior,
    seeded,
)
from bkd_fast.app.experiments.experiment import Experiment, Figures
from bkd_fast.app.run import coverage
from bkd_fast.posterior.metrics import interval_coverage

DIMENSIONS = 5
LEVELS = (0.5, 0.8, 0.95)
# of the linear student; the true weights are drawn from this very prior, so that exact inference is calibrated
LINEAR_PRECISION = 2.0
TRUE_UNITS, STUDENT_UNITS, TEACHER_UNITS = 20, 6, 100  # tanh units of the networks that are not linear
NETWORK_PRECISION = 1.0


@dataclass(frozen=True)
class Settings:
    """train, rows: training points and test inputs; steps: of a fit, on all points at once."""

    train: int
    rows: int
    steps: int = 300
    classes: tuple[int, ...] = (2, 5)
    strengths: tuple[float, ...] = (1.0, 5.0)
    chains: int = 2
    burn_in: int = 500
    thin: int = 10
    num_draws: int = 100
    dropout: float = 0.1
    passes: int = 200


class Problem:
    """Inputs N(0, 1) in five dimensions, and classes whose log probabilities are known; everything is drawn from `seed`.

    The logits are linear in x with weights and biases N(0, 1 / 2), or those of a network of 20 tanh units with N(0, 1) weights
    into them and N(0, 1 / 2) out of them.
    """

    def __init__(self, linear: bool, classes: int, seed: int) -> None:
        self.linear, self.classes = linear, classes
        self.generator = torch.Generator().manual_seed(seed)
        inputs = DIMENSIONS if linear else TRUE_UNITS
        self.inner, self.inner_bias = self._normal(TRUE_UNITS, DIMENSIONS), self._normal(TRUE_UNITS)
        scale = LINEAR_PRECISION**-0.5
        self.outer, self.outer_bias = scale * self._normal(classes, inputs), scale * self._normal(classes)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def log_probs(self, x: Tensor) -> Tensor:
        """(rows, classes) the true log p(y given x)."""
        if not self.linear:
            x = torch.tanh(x @ self.inner.T + self.inner_bias)
        logits: Tensor = x @ self.outer.T + self.outer_bias
        return logits.log_softmax(1)

    def draw(self, rows: int) -> tuple[Tensor, Tensor]:
        """Inputs (rows, 5) and their classes (rows,)."""
        x = self._normal(rows, DIMENSIONS)
        return x, torch.multinomial(self.log_probs(x).exp(), 1, generator=self.generator)[:, 0]


@dataclass(frozen=True)
class Method:
    """A posterior that is sampled: lambda, the temperature of the posterior, and whose word the teacher's is."""

    prior_strength: float
    temperature: float = 1.0
    exact: bool = False

    def theory(self, level: float) -> float:
        """Coverage of the truth by intervals of a well specified student of much data (docs/experiments.md, A).

        In units of what N labels tell, the posterior has variance T / (1 + lambda), its centre 1 if the teacher learned
        efficiently from the same labels, 1 / (1 + lambda)^2 if it knows the truth.
        """
        share = 1 + self.prior_strength
        ratio = math.sqrt(self.temperature / share) * (share if self.exact else 1)
        z = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))
        return float(2 * torch.special.ndtr(z * ratio) - 1)


def methods(settings: Settings) -> dict[str, Method]:
    found = {"Bayes, no teacher": Method(0.0)}
    for strength in settings.strengths:
        found[f"BKD, lambda = {strength:g}"] = Method(strength)
        found[f"BKD, lambda = {strength:g}, T = {1 + strength:g}"] = Method(strength, 1 + strength)
    strongest = max(settings.strengths)
    found[f"BKD, lambda = {strongest:g}, exact teacher"] = Method(strongest, exact=True)
    return found


def network(units: int, classes: int, dropout: float = 0.0) -> nn.Module:
    """A linear layer (0 units) or one hidden layer of tanh units; dropout before the last layer."""
    drop = [nn.Dropout(dropout)] if dropout else []
    if not units:
        return nn.Sequential(*drop, nn.Linear(DIMENSIONS, classes))
    return nn.Sequential(nn.Linear(DIMENSIONS, units), nn.Tanh(), *drop, nn.Linear(units, classes))


def scores_of(posterior: bkd.PosteriorPredictive, truth: Tensor, labels: Tensor) -> dict[str, float]:
    """`point_scores`, coverage of labels by intervals of the deviance, and of true probabilities by those of probabilities."""
    mean = posterior.mean.double()
    found = point_scores(mean.clamp_min(1e-30).log(), truth)
    for level, of_labels in zip(LEVELS, coverage(posterior, labels, list(LEVELS)), strict=True):
        percent = round(100 * level)
        of_truth = interval_coverage(*posterior.interval(level), truth.exp(), level, mean.argmax(1))
        found |= {
            f"truth {percent}": of_truth.coverage.cells,
            f"length {percent}": of_truth.length,
            f"labels {percent}": of_labels.plug_in,
            f"labels {percent}, averaged": of_labels.averaged,
        }
    return found


def point_coverage(log_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Coverage of labels by a point estimate, log_probs (rows, C): where the more probable classes hold less than the level.

    That is `-2 log q_y <= U` with equality told exactly, which a sketch cannot.
    """
    own = log_probs.gather(1, labels[:, None])
    above = torch.where(log_probs > own, log_probs.exp(), 0.0).sum(1)
    return {f"labels {round(100 * level)}": float((above < level).double().mean()) for level in LEVELS}


def run_scenario(linear: bool, classes: int, seed: int, settings: Settings) -> dict[str, dict[str, float]]:
    """Every method on one problem."""
    problem = Problem(linear, classes, seed)
    x, y = problem.draw(settings.train)
    test_x, labels = problem.draw(settings.rows)
    truth = problem.log_probs(test_x).double()
    precision = LINEAR_PRECISION if linear else NETWORK_PRECISION

    def point_of(model: nn.Module) -> dict[str, float]:
        log_probs = logits_of(model, test_x).double().log_softmax(1)
        return point_scores(log_probs, truth) | point_coverage(log_probs, labels)

    def trained(make: Callable[[], nn.Module], loss: Callable[..., Tensor], number: int, *targets: Tensor) -> nn.Module:
        points = Batches(x, *targets, batch_size=len(x), shuffle_seed=number)
        start = seeded(make, 1000 * seed + number)
        return fit(start, points, loss, epochs=settings.steps, lr=3e-2, weight_decay=precision / len(x))

    units = 0 if linear else STUDENT_UNITS
    student = partial(network, units, classes)
    teacher = trained(partial(network, 0 if linear else TEACHER_UNITS, classes), functional.cross_entropy, 0, y)
    own, exact = logits_of(teacher, x), problem.log_probs(x)
    found = {"truth": point_scores(truth, truth), "teacher": point_of(teacher)}
    for name, method in methods(settings).items():
        loss, logits = bkd.KDLoss(method.prior_strength), exact if method.exact else own
        starts = [trained(student, loss, 1 + chain, y, logits) for chain in range(settings.chains)]
        (posterior,), figures = sample_posterior(
            starts,
            loss,
            Batches(x, y, logits, batch_size=len(x), shuffle_seed=seed),
            [test_x],
            num_data=len(x),
            prior_precision=precision,
            temperature=method.temperature,
            burn_in=settings.burn_in,
            thin=settings.thin,
            num_draws=settings.num_draws,
            seed=seed,
        )
        theory = {"theory 95": method.theory(0.95)} if linear else {}
        found[name] = scores_of(posterior, truth, labels) | theory | figures
    loss = bkd.KDLoss(max(settings.strengths))
    found["KD"] = point_of(trained(student, loss, 1, y, own))
    dropped = trained(partial(student, settings.dropout), loss, 1, y, own)
    passes = dropout_logits(dropped, test_x, settings.passes, seed)
    found["MC dropout"] = scores_of(predictive(passes), truth, labels)
    return found


def run(seed: int, settings: Settings) -> Figures:
    found: dict[str, Mapping[str, float]] = {}
    for linear in (True, False):
        for classes in settings.classes:
            scenario = f"{'linear' if linear else 'non-linear'}, {classes} classes"
            rows = run_scenario(linear, classes, seed, settings)
            found |= {f"{scenario}: {name}": figures for name, figures in rows.items()}
    return found


QUICK = Settings(1000, 1000)
DEVIATIONS = (
    "We quote no figures of these scenarios, and the paper's generating process is not known to us. Ours: x is N(0, 1) in "
    f"{DIMENSIONS} dimensions; linear logits have weights and biases N(0, 1/2), drawn anew for every seed; those that are not "
    f"linear come from {TRUE_UNITS} tanh units, N(0, 1) weights and biases into them and N(0, 1/2) out of them. Every seed is "
    "another problem.",
    "The linear student is well specified, and its prior is the one that the truth is drawn from, so that exact inference "
    f"without a teacher is calibrated. The non-linear student has {STUDENT_UNITS} tanh units and is misspecified.",
    "The teacher learned from the student's own points: in the linear scenarios a linear model, which is efficient, so that "
    f"the theory of coverage holds; in the others {TEACHER_UNITS} tanh units. Both are fitted with the student's Gaussian "
    "prior. The exact teacher says p(y given x) of the training points. KD and MC dropout have the own teacher and the "
    "largest lambda.",
    "truth: share of cells (row, class) whose true probability is in the interval; theory 95: what that is with much data "
    "(docs/experiments.md, A). labels: share of test labels whose deviance is in [0, U], under the predictive mean or "
    "(averaged) over draws. A point estimate has no interval for the truth. Accuracy, nll and kl(true, predicted) are "
    "expectations under the truth. T is the posterior's temperature.",
    "full has more test points and draws; training points are as many.",
)
EXPERIMENTS = (
    Experiment(
        name="bkd-synthetic",
        title="Bayesian knowledge distillation on four problems of known class probabilities",
        source=(
            "Fang, Chen, Xie, Wang and Zhang, Bayesian Knowledge Distillation (ICML 2024), the synthetic scenarios: linear and "
            "non-linear decision, 2 and 5 classes"
        ),
        comparison="same method, other data",
        run=run,
        full=replace(QUICK, rows=10_000, burn_in=2000, num_draws=1000),
        quick=QUICK,
        tiny=Settings(60, 40, 5, (2,), (1.0,), burn_in=2, thin=1, num_draws=8, passes=8),
        columns=(
            "accuracy",
            "nll",
            "kl",
            "theory 95",
            *(f"truth {round(100 * level)}" for level in LEVELS),
            "length 95",
            *(f"labels {round(100 * level)}" for level in LEVELS),
            *(f"labels {round(100 * level)}, averaged" for level in LEVELS),
            "r_hat",
        ),
        deviations=DEVIATIONS,
        seeds=10,
    ),
)
