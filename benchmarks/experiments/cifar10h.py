"""`python -m benchmarks.experiments.cifar10h`: BKD on CIFAR-10 against what people say of its test images (CIFAR-10H).

Every test image has 47 to 63 human labels: a sample of p(y given x). The teacher is trained once and cached in the temporary
folder; a seed is a student's initial parameters, its order of batches and its chains. CIFAR-10 is read as JPEG from the
folder $BKD_FAST_DATA.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
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
    predictive,
    sample_head,
    seeded,
)
from bkd_fast.app.experiments.datasets import cifar10, folder
from bkd_fast.posterior.metrics import (
    interval_coverage,
    rank_correlation,
    risk_coverage,
    vote_divergence,
    vote_frequencies,
    vote_pit,
)

CACHE = Path(tempfile.gettempdir())  # of the trained teacher
CLASSES = 10
LEVELS = (0.5, 0.8, 0.95)
QUANTILES = 40  # that stand for a posterior where it is mixed with the sampling of votes


@dataclass(frozen=True)
class Settings:
    """train, test: images; batch_size: of training, sampling_batch: of the chains, which sample the head alone."""

    train: int = 50_000
    test: int = 10_000
    teacher_epochs: int = 10
    student_epochs: int = 5
    batch_size: int = 250
    prior_strength: float = 5.0
    temperature: float = 2.0
    prior_precision: float = 100.0
    sampling_batch: int = 1000
    chains: int = 2
    burn_in: int = 1000
    thin: int = 20
    num_draws: int = 100
    members: int = 3
    dropout: float = 0.1
    passes: int = 30


SMALL = Settings(200, 60, 1, 1, 50, sampling_batch=50, burn_in=5, thin=1, num_draws=8)


@dataclass(frozen=True)
class Data:
    """x: (N, 3, 32, 32) float32, centred and scaled by channel; y: (N,) int64; counts: (M, 10) float64 human labels."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    counts: Tensor


def load(settings: Settings) -> Data:
    counts = torch.from_numpy(np.load(folder() / "cifar10h-counts.npy")[: settings.test].astype(np.float64))
    return Data(*cifar10(settings.train, settings.test), counts)


# ---- networks ----


def teacher_network() -> nn.Sequential:
    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    stem = [nn.Conv2d(3, 32, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    blocks = [*block(32, 64), nn.MaxPool2d(2), *block(64, 128), nn.MaxPool2d(2), *block(128, 128)]
    network = nn.Sequential(*stem, *blocks, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, CLASSES))
    return network.to(memory_format=torch.channels_last)


def student_network(dropout: float = 0.0) -> nn.Sequential:
    """Three strided convolutions without batch norm, and a linear head: 58 thousand parameters; [0] is the body."""
    body = nn.Sequential(
        nn.Conv2d(3, 24, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 48, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(48, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
    )
    drop = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(body, *drop, nn.Linear(1024, CLASSES)).to(memory_format=torch.channels_last)


class Augmented:
    """Batches of images, each mirrored at random and each batch moved by up to two pixels; for the teacher alone."""

    def __init__(self, batches: Batches, seed: int) -> None:
        self.batches, self.generator = batches, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for x, *rest in self.batches:
            mirror = torch.rand(len(x), 1, 1, 1, generator=self.generator) < 0.5
            down, right = torch.randint(5, (2,), generator=self.generator).tolist()
            padded = functional.pad(torch.where(mirror, x.flip(3), x), (2, 2, 2, 2))
            yield padded[:, :, down : down + 32, right : right + 32], *rest


def teacher_logits(data: Data, settings: Settings) -> tuple[Tensor, Tensor]:
    """The teacher's logits on training and test images, from the temporary folder if such a teacher was trained before."""
    cache = CACHE / f"bkd_fast_cifar10_{settings.train}_{settings.teacher_epochs}.safetensors"
    if not cache.exists():
        batches = Batches(data.train_x, data.train_y, batch_size=settings.batch_size, shuffle_seed=0)
        network = seeded(teacher_network, 0)
        fit(network, Augmented(batches, 0), functional.cross_entropy, epochs=settings.teacher_epochs, lr=3e-3)
        save_file({"train": logits_of(network, data.train_x), "test": logits_of(network, data.test_x)}, cache)
    tensors = load_file(cache)
    return tensors["train"], tensors["test"][: settings.test]


def centred_head(student: nn.Sequential, x: Tensor, test_x: Tensor) -> tuple[nn.Linear, Tensor, Tensor]:
    """The same logits from the body's features minus their mean, along which the energy is far more curved: head and features."""
    body, head = student[0], student[-1]
    features, test = logits_of(body, x), logits_of(body, test_x)
    middle = features.mean(0)
    centred = copy.deepcopy(head)
    with torch.no_grad():
        centred.bias += head.weight @ middle
    return centred, features - middle, test - middle


# ---- scores ----


def scores_of(mean: Tensor, deviance: Tensor, quantile: Callable[[float], Tensor], data: Data) -> dict[str, float]:
    """How predicted probabilities agree with people and with the labels.

    kl: KL(human frequencies || predicted), nats, mean over images; nll: per human label; spearman: of the deviance with the
    entropy of the human labels; aurc: of the errors against CIFAR-10's own labels. At each level: naive coverage of human
    frequencies and length; "votes", coverage of human counts by the predictive distribution of counts, over cells and
    in the predicted class.

    Args:
        mean: (M, 10) predicted probabilities.
        deviance: (M,) the score of uncertainty that ranks the images.
        quantile: q -> (M, 10), of each probability.
    """
    divergence = vote_divergence(mean, data.counts)
    top = mean.argmax(1)
    wrong = (top != data.test_y).double()
    votes = data.counts.sum(1)
    found = {
        "accuracy": 1 - float(wrong.mean()),
        "kl": float(divergence.kl.mean()),
        "nll": float((divergence.cross_entropy * votes).sum() / votes.sum()),
        "spearman": rank_correlation(deviance, divergence.entropy),
        "aurc": risk_coverage(deviance, wrong).area,
    }
    human = vote_frequencies(data.counts)
    pit = vote_pit(torch.stack([quantile((j + 0.5) / QUANTILES) for j in range(QUANTILES)]), data.counts)
    for level in LEVELS:
        lower, upper = quantile((1 - level) / 2), quantile((1 + level) / 2)
        naive, calibrated = interval_coverage(lower, upper, human, level, top), pit.coverage(level, top)
        percent = round(100 * level)
        found |= {
            f"naive {percent}": naive.coverage.cells,
            f"naive top {percent}": naive.coverage.top,
            f"length {percent}": naive.length,
            f"votes {percent}": calibrated.cells,
            f"votes top {percent}": calibrated.top,
        }
    return found


def point_scores(logits: Tensor, data: Data) -> dict[str, float]:
    """Of a network, whose intervals have no length."""
    probs = logits.double().softmax(1)
    return scores_of(probs, 2 * torch.special.entr(probs).sum(1), lambda _: probs, data)


def posterior_scores(
    posterior: bkd.PosteriorPredictive, data: Data, quantile: Callable[[float], Tensor] | None = None
) -> dict[str, float]:
    """Of draws; `quantile` in the place of the posterior's own."""
    return scores_of(posterior.mean, posterior.mean_deviance, quantile or posterior.quantile, data)


# ---- the experiment ----


def run_seed(seed: int, data: Data, teacher: tuple[Tensor, Tensor], settings: Settings) -> dict[str, dict[str, float]]:
    loss = bkd.KDLoss(settings.prior_strength, settings.temperature)

    def batches(number: int) -> Batches:
        return Batches(
            data.train_x, data.train_y, teacher[0], batch_size=settings.batch_size, shuffle_seed=10 * seed + number
        )

    def distil(number: int, dropout: float = 0.0) -> nn.Module:
        network = seeded(lambda: student_network(dropout), 10 * seed + number)
        decay = settings.prior_precision / settings.train
        return fit(network, batches(number), loss, epochs=settings.student_epochs, lr=2e-3, weight_decay=decay)

    members = [distil(number) for number in range(settings.members)]
    logits = torch.stack([logits_of(member, data.test_x) for member in members])
    found = {"teacher": point_scores(teacher[1], data), "KD": point_scores(logits[0], data)}
    head, features, test_features = centred_head(members[0], data.train_x, data.test_x)
    (posterior,), figures = sample_head(
        head,
        loss,
        Batches(features, data.train_y, teacher[0], batch_size=settings.sampling_batch, shuffle_seed=seed),
        [test_features],
        num_data=settings.train,
        prior_precision=settings.prior_precision,
        chains=settings.chains,
        burn_in=settings.burn_in,
        thin=settings.thin,
        num_draws=settings.num_draws,
        seed=seed,
    )
    found["BKD"] = posterior_scores(posterior, data) | figures
    print(f"seed {seed}: head sampled", flush=True)
    passes = dropout_logits(distil(9, settings.dropout), data.test_x, settings.passes, seed)
    found["MC dropout"] = posterior_scores(predictive(passes), data)
    found["ensemble"] = posterior_scores(predictive(logits), data, partial(normal_quantile, logits))
    print(f"seed {seed}: done", flush=True)
    return found


def run(seeds: Sequence[int], settings: Settings) -> dict[str, dict[str, list[float]]]:
    data = load(settings)
    teacher = teacher_logits(data, settings)
    return over_seeds([run_seed(seed, data, teacher, settings) for seed in seeds])


def main() -> None:
    options = arguments(__doc__, seeds=3)
    begin = time.perf_counter()
    settings = SMALL if options.small else Settings()
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    results = run(seeds, settings)
    print_table(results, ["accuracy", "kl", "nll", "spearman", "aurc", "r_hat", "noise_share"])
    for kind in ("naive", "naive top", "votes", "votes top", "length"):
        print_table(results, [f"{kind} {round(100 * level)}" for level in LEVELS])
    if not options.small and options.first_seed == 0:
        command = f"python -m benchmarks.experiments.cifar10h --seeds {options.seeds}"
        save("cifar10h", command, {**asdict(settings), "seeds": seeds}, results, begin)


if __name__ == "__main__":
    main()
