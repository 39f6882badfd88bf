"""`python -m benchmarks.experiments.gaussians`: do credible intervals cover class probabilities that are known?

Ten Gaussians in 30 dimensions, means in {-1, 0, 1}^30, variance 6: Bayes' rule gives every class probability, and the log odds
are linear in x, so that a linear softmax student is well specified; a network with 8 hidden units is not.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import bkd_fast as bkd
from benchmarks.experiments.common import arguments, print_table, save
from bkd_fast.app.data import Batches
from bkd_fast.app.experiments.common import (
    dropout_logits,
    fit,
    logits_of,
    normal_quantile,
    over_seeds,
    point_scores,
    predictive,
    sample_posterior,
    seeded,
)
from bkd_fast.app.experiments.datasets import Gaussians
from bkd_fast.posterior.metrics import interval_coverage

CLASSES, DIMENSIONS = Gaussians.classes, Gaussians.dimensions
LEVELS = (0.5, 0.8, 0.95)
# prior precision of each student's parameters: the variance of the true weights m / 6 is (2/3) / 36
PRIOR_PRECISION = {"linear": 54.0, "mlp": 10.0}


@dataclass(frozen=True)
class Settings:
    """sizes: training sets; large: the large teacher's training set; rows: test inputs."""

    sizes: tuple[int, ...] = (200, 1000, 4000)
    teachers: tuple[str, ...] = ("own", "large", "exact")
    large: int = 20_000
    rows: int = 1000
    prior_strength: float = 5.0
    batch_size: int = 2000
    steps: int = 300  # of a fit, at least
    chains: int = 2
    burn_in: int = 500
    thin: int = 10
    num_draws: int = 100
    members: int = 5
    dropout: float = 0.1
    passes: int = 400


SMALL = Settings((100,), ("own",), 500, 50, 5.0, 50, 10, 2, 2, 1, num_draws=8, members=3, passes=8)


def student(kind: str, dropout: float = 0.0) -> nn.Sequential:
    """A linear softmax model, or a network with 8 hidden units, whose logits have rank 8 where the truth has 9."""
    drop = [nn.Dropout(dropout)] if dropout else []
    if kind == "linear":
        return nn.Sequential(*drop, nn.Linear(DIMENSIONS, CLASSES))
    return nn.Sequential(*drop, nn.Linear(DIMENSIONS, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def train_teacher(x: Tensor, y: Tensor, settings: Settings, seed: int) -> nn.Module:
    network = seeded(
        lambda: nn.Sequential(nn.Linear(DIMENSIONS, 200), nn.ReLU(), nn.Dropout(0.5), nn.Linear(200, CLASSES)), seed
    )
    batches = Batches(x, y, batch_size=min(settings.batch_size, 200), shuffle_seed=seed)
    epochs = -(-settings.steps // len(batches))
    return fit(network, batches, functional.cross_entropy, epochs=epochs, lr=2e-3, weight_decay=1e-2)


def scores_of(
    posterior: bkd.PosteriorPredictive, truth: Tensor, quantile: Callable[[float], Tensor] | None = None
) -> dict[str, float]:
    """`point_scores` of the mean, and of each level's intervals the coverage of true probabilities over all cells and in the
    predicted class, the mean length and the interval score; `quantile` in the place of the posterior's own."""
    quantile = quantile or posterior.quantile
    mean = posterior.mean.double()
    found = point_scores(mean.clamp_min(1e-30).log(), truth)
    for level in LEVELS:
        lower, upper = quantile((1 - level) / 2), quantile((1 + level) / 2)
        interval = interval_coverage(lower, upper, truth.exp(), level, mean.argmax(1))
        percent = round(100 * level)
        found |= {
            f"coverage {percent}": interval.coverage.cells,
            f"top coverage {percent}": interval.coverage.top,
            f"length {percent}": interval.length,
            f"score {percent}": interval.score,
        }
    return found


def run_seed(seed: int, settings: Settings) -> dict[str, dict[str, float]]:
    """{"size/teacher/student/method": figures} for one problem."""
    problem = Gaussians(seed)
    x, y = problem.draw(max(settings.sizes))
    others = problem.draw(settings.large)
    test_x, _ = problem.draw(settings.rows)
    truth = problem.log_probs(test_x).double()
    found = {"Bayes": point_scores(truth, truth)}
    large = train_teacher(*others, settings, seed)
    for size in settings.sizes:
        inputs, labels = x[:size], y[:size]
        own = train_teacher(inputs, labels, settings, seed)
        teachers = {
            "own": (logits_of(own, inputs), logits_of(own, test_x)),
            "large": (logits_of(large, inputs), logits_of(large, test_x)),
            "exact": (problem.log_probs(inputs), truth),
        }
        for kind in PRIOR_PRECISION:
            none = torch.zeros(size, CLASSES)  # not read at prior_strength 0
            plain = run_methods(kind, inputs, labels, none, test_x, truth, replace(settings, prior_strength=0.0), seed)
            found |= {f"{size}/none/{kind}/{method}": scores for method, scores in plain.items()}
            for name in settings.teachers:
                found[f"{size}/{name}/teacher"] = point_scores(teachers[name][1].double().log_softmax(1), truth)
                methods = run_methods(kind, inputs, labels, teachers[name][0], test_x, truth, settings, seed)
                found |= {f"{size}/{name}/{kind}/{method}": scores for method, scores in methods.items()}
        print(f"seed {seed}, N = {size}: done", flush=True)
    return found


def run_methods(
    kind: str, x: Tensor, y: Tensor, teacher: Tensor, test_x: Tensor, truth: Tensor, settings: Settings, seed: int
) -> dict[str, dict[str, float]]:
    """Every method on one training set with one teacher; without a teacher the two Bayesian ones are the same, and one is run."""
    loss = bkd.KDLoss(settings.prior_strength)
    precision = PRIOR_PRECISION[kind]
    decay = precision / len(x)

    def batches(number: int) -> Batches:
        return Batches(x, y, teacher, batch_size=settings.batch_size, shuffle_seed=1000 * seed + number)

    def distil(number: int, dropout: float = 0.0) -> nn.Module:
        order = batches(number)
        epochs = -(-settings.steps // len(order))
        network = seeded(lambda: student(kind, dropout), 1000 * seed + number)
        return fit(network, order, loss, epochs=epochs, lr=1e-2, weight_decay=decay)

    members = [distil(number) for number in range(settings.members)]
    logits = torch.stack([logits_of(member, test_x) for member in members])
    found = {"KD": point_scores(logits[0].double().log_softmax(1), truth)}
    # the posterior, and the one as wide as the labels alone allow, at temperature 1 + lambda
    temperatures = {"BKD": 1.0, "BKD, T = 1 + lambda": 1 + settings.prior_strength}
    for method, temperature in temperatures.items() if settings.prior_strength else [("Bayes", 1.0)]:
        (posterior,), figures = sample_posterior(
            members[: settings.chains],
            loss,
            batches(100),
            [test_x],
            num_data=len(x),
            prior_precision=precision,
            temperature=temperature,
            burn_in=settings.burn_in,
            thin=settings.thin,
            num_draws=settings.num_draws,
            seed=seed,
        )
        found[method] = scores_of(posterior, truth) | figures
    passes = dropout_logits(distil(200, settings.dropout), test_x, settings.passes, seed)
    found["MC dropout"] = scores_of(predictive(passes), truth)
    found["ensemble"] = scores_of(predictive(logits), truth, partial(normal_quantile, logits))
    return found


def run(seeds: Sequence[int], settings: Settings) -> dict[str, dict[str, list[float]]]:
    return over_seeds([run_seed(seed, settings) for seed in seeds])


def main() -> None:
    options = arguments(__doc__, seeds=5)
    begin = time.perf_counter()
    settings = SMALL if options.small else Settings()
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    results = run(seeds, settings)
    figures = [
        "accuracy",
        "kl",
        *(f"{kind} {round(100 * level)}" for kind in ("coverage", "length") for level in LEVELS),
    ]
    print_table(results, [*figures, "top coverage 95", "score 95", "r_hat", "noise_share"])
    if not options.small and options.first_seed == 0:
        about: dict[str, Any] = {**asdict(settings), "prior_precision": PRIOR_PRECISION, "seeds": seeds}
        command = f"python -m benchmarks.experiments.gaussians --seeds {options.seeds}"
        save("gaussians", command, about, results, begin)


if __name__ == "__main__":
    main()
