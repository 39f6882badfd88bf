"""`python -m benchmarks.experiments.mnist_ood`: does a student trained on digits notice letters (notMNIST) and kana (KMNIST)?

Every parameter of a small network is sampled; its scores of uncertainty tell MNIST's test images from the others. All are read
from $BKD_FAST_DATA.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import bkd_fast as bkd
from benchmarks.experiments.common import arguments, print_table, save
from bkd_fast.app import config
from bkd_fast.app import data as app_data
from bkd_fast.app.data import Batches, Images
from bkd_fast.app.experiments.common import (
    dropout_logits,
    fit,
    logits_of,
    over_seeds,
    predictive,
    sample_posterior,
    seeded,
)
from bkd_fast.app.experiments.datasets import OTHERS, unlike_mnist
from bkd_fast.posterior.metrics import ood_detection


@dataclass(frozen=True)
class Settings:
    """train, test: images of MNIST; others: images of each other set."""

    train: int = 60_000
    test: int = 10_000
    others: int = 10_000
    teacher_epochs: int = 6
    student_epochs: int = 10
    batch_size: int = 200
    prior_strength: float = 5.0
    temperature: float = 2.0
    prior_precision: float = 100.0
    chains: int = 2
    burn_in: int = 3000
    thin: int = 50
    num_draws: int = 100
    members: int = 5
    dropout: float = 0.1
    passes: int = 50


SMALL = Settings(300, 60, 60, 1, 2, 100, burn_in=2, thin=1, num_draws=4, members=2, passes=4)


def network(hidden: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """A multilayer perceptron from images to logits; dropout before every layer but the first."""
    layers: list[nn.Module] = [nn.Flatten()]
    before = 784
    for width in hidden:
        layers += [nn.Linear(before, width), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
        before = width
    return nn.Sequential(*layers, nn.Linear(before, 10))


def uncertainties(summary: bkd.PosteriorPredictive) -> dict[str, Tensor]:
    """(N,) of each score, larger is less certain."""
    return {
        "mean deviance": summary.mean_deviance,
        "entropy": summary.predictive_entropy,
        "mutual information": summary.mutual_information,
        "1 - max": 1 - summary.mean.amax(1),
    }


def scores_of(summaries: Sequence[bkd.PosteriorPredictive], labels: Tensor, point: bool = False) -> dict[str, float]:
    """Figures of the predictives of MNIST's test images, notMNIST and KMNIST; a point estimate has no mutual information."""
    mean = summaries[0].mean.double()
    own = mean.gather(1, labels[:, None]).clamp_min(1e-30)
    found = {"accuracy": float((mean.argmax(1) == labels).double().mean()), "nll": -float(own.log().mean())}
    inside, *outside = map(uncertainties, summaries)
    for name, foreign in zip(OTHERS, outside, strict=True):
        for score in inside:
            if not (point and score == "mutual information"):
                detection = ood_detection(inside[score], foreign[score])
                found[f"{name} {score} AUROC"] = detection.auroc
                found[f"{name} {score} FPR95"] = detection.fpr_at_95_tpr
    return found


def run_seed(seed: int, images: Images, others: dict[str, Tensor], settings: Settings) -> dict[str, dict[str, float]]:
    tests = [images.test_x, *(x - images.mean for x in others.values())]
    order = Batches(images.train_x, images.train_y, batch_size=settings.batch_size, shuffle_seed=seed)
    teacher = seeded(lambda: network([400, 400], dropout=0.2), seed)
    fit(teacher, order, functional.cross_entropy, epochs=settings.teacher_epochs, lr=1e-3)
    labels = logits_of(teacher, images.train_x)
    decay = settings.prior_precision / settings.train

    def batches(number: int) -> Batches:
        shuffle = 100 * seed + number
        return Batches(images.train_x, images.train_y, labels, batch_size=settings.batch_size, shuffle_seed=shuffle)

    def distil(loss: bkd.KDLoss, number: int, dropout: float = 0.0) -> nn.Module:
        student = seeded(lambda: network([100], dropout), 100 * seed + number)
        return fit(
            student,
            batches(number),
            loss,
            epochs=settings.student_epochs,
            lr=2e-3,
            weight_decay=decay,
        )

    def point(model: nn.Module) -> dict[str, float]:
        return scores_of([predictive(logits_of(model, x)[None]) for x in tests], images.test_y, point=True)

    loss = bkd.KDLoss(settings.prior_strength, settings.temperature)
    members = [distil(loss, number) for number in range(settings.members)]
    found = {"teacher": point(teacher), "KD": point(members[0])}
    alone = bkd.KDLoss(0.0)
    unaided = [distil(alone, 50 + number) for number in range(settings.chains)]
    for method, start, energy in (
        ("BKD", members[: settings.chains], loss),
        ("Bayes without teacher", unaided, alone),
    ):
        posteriors, figures = sample_posterior(
            start,
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
        found[method] = scores_of(posteriors, images.test_y) | figures
        print(f"seed {seed}: {method} sampled", flush=True)
    dropped = distil(loss, 30, settings.dropout)
    passes = [predictive(dropout_logits(dropped, x, settings.passes, seed)) for x in tests]
    found["MC dropout"] = scores_of(passes, images.test_y)
    ensemble = [predictive(torch.stack([logits_of(member, x) for member in members])) for x in tests]
    found["ensemble"] = scores_of(ensemble, images.test_y)
    print(f"seed {seed}: done", flush=True)
    return found


def run(seeds: Sequence[int], settings: Settings) -> dict[str, dict[str, list[float]]]:
    which = config.Data(name="mnist", train_size=settings.train, test_size=settings.test)
    others = unlike_mnist(settings.others)
    return over_seeds([run_seed(seed, app_data.load(which, seed), others, settings) for seed in seeds])


def main() -> None:
    options = arguments(__doc__, seeds=3)
    begin = time.perf_counter()
    settings = SMALL if options.small else Settings()
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    results = run(seeds, settings)
    print_table(results, ["accuracy", "nll", "r_hat", "noise_share", "stationarity"])
    for name in OTHERS:
        for figure in ("AUROC", "FPR95"):
            scores = ("mean deviance", "entropy", "mutual information", "1 - max")
            print_table(results, [f"{name} {score} {figure}" for score in scores])
    if not options.small and options.first_seed == 0:
        command = f"python -m benchmarks.experiments.mnist_ood --seeds {options.seeds}"
        save("mnist_ood", command, {**asdict(settings), "seeds": seeds}, results, begin)


if __name__ == "__main__":
    main()
