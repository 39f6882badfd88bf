"""The main job: teacher, distilled student, the student's posterior, and what it says about the test images."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import bkd_fast as bkd
from bkd_fast.app import data, figures, models, report, train
from bkd_fast.app.config import Config
from bkd_fast.app.doctor import versions
from bkd_fast.app.log import ChainLog, Log
from bkd_fast.app.results import Convergence, Coverage, Results, Timings, Trace
from bkd_fast.app.scores import Prediction
from bkd_fast.posterior.metrics import averaged_deviance_coverage, deviance_coverage

# nominal levels at which the deviance intervals are held against the labels, besides the configured one
COVERAGE_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
# posterior quantiles of the label's probability that stand for its distribution in the averaged reading
COVERAGE_QUANTILES = 100


@dataclass(frozen=True)
class Outputs:
    """The files of a run in its folder."""

    folder: Path

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.json"

    @property
    def figures(self) -> Path:
        return self.folder / "figures"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def draws(self) -> Path:
        return self.folder / "draws.safetensors"

    @property
    def card(self) -> Path:
        """Of the draws."""
        return self.folder / "draws.json"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher.safetensors"

    def clear(self) -> None:
        """Make the folder and remove the results of an earlier run, so that none of them outlives a failure.

        The cached teacher stays: it knows what it was trained on.
        """
        self.figures.mkdir(parents=True, exist_ok=True)
        for path in (self.metrics, self.report, self.log, self.draws, self.card, *self.figures.glob("*.png")):
            path.unlink(missing_ok=True)


def run(config: Config, console: Console) -> Results:
    """Do everything that `config` asks for and leave the outputs in its folder.

    Raises:
        DataUnavailableError, ConfigError: before anything is written.
    """
    images = data.load(config.data, config.seed)
    for section in (config.teacher, config.student):
        models.build(section.model, images.shape, images.num_classes, config.seed)
    outputs = Outputs(config.output)
    outputs.clear()
    with _threads(config.threads), Log(outputs.log) as log:
        log.write("start", config=config.model_dump(mode="json"), machine=versions())
        results = _work(config, images, outputs, log, console)
        with console.status("figures and report"):
            outputs.metrics.write_text(json.dumps(results.as_dict(), indent=2) + "\n", encoding="utf-8")
            drawn = figures.draw_all(results, outputs.figures)
            report.write(results, drawn, outputs.report)
        log.write("end")
    return results


def _work(config: Config, images: data.Images, outputs: Outputs, log: Log, console: Console) -> Results:
    begin = time.perf_counter()
    with console.status("teacher"):
        teacher = train.train_teacher(images, config.teacher, config.seed, outputs.teacher, _epochs(log, "teacher"))
    teacher_seconds = time.perf_counter() - begin

    begin = time.perf_counter()
    loss = bkd.KDLoss(config.distillation.prior_strength, config.distillation.temperature)
    with console.status("distilled student"):
        student = train.distil_student(
            images, teacher.train_logits, loss, config.student, config.seed + 1, _epochs(log, "student")
        )
    student_seconds = time.perf_counter() - begin

    chain = ChainLog(log, config.sampling.log_every)
    posterior, sampling_seconds, predictive_seconds = _sample(
        config, images, teacher, student, loss, chain, outputs.draws, console
    )

    parameters = models.count_parameters(student)
    lower, upper = posterior.interval(config.posterior.level)
    large, small = (
        models.describe(part.model, images.shape, images.num_classes) for part in (config.teacher, config.student)
    )
    return Results(
        config=config,
        images=images,
        architectures={"teacher": large, "kd": small, "bkd": small},
        teacher=Prediction.from_logits("teacher", "Teacher", teacher.test_logits, teacher.parameters),
        kd=Prediction.from_logits("kd", "KD student", train.logits(student, images.test_x), parameters),
        bkd=Prediction.from_posterior("bkd", "BKD student", posterior, parameters),
        lower=lower,
        upper=upper,
        mutual_information=posterior.mutual_information,
        convergence=Convergence.of(posterior.diagnostics()),
        coverage=coverage(posterior, images.test_y, sorted({*COVERAGE_LEVELS, config.posterior.level})),
        trace=Trace.of(chain),
        timings=Timings(teacher_seconds, student_seconds, sampling_seconds, predictive_seconds, log.seconds),
        teacher_reused=teacher.reused,
        machine=versions(),
    )


def _sample(
    config: Config,
    images: data.Images,
    teacher: train.Teacher,
    student: nn.Module,
    loss: bkd.KDLoss,
    chain: ChainLog,
    kept: Path,
    console: Console,
) -> tuple[bkd.PosteriorPredictive, float, float]:
    """Run the chain from the student's point estimate; the posterior, and the seconds of chain and predictive."""
    settings = config.sampling
    model = deepcopy(student)
    sampler = bkd.SGLD(
        model.named_parameters(),
        lr=settings.lr,
        num_data=len(images.train_y),
        temperature=settings.temperature,
        prior_precision=settings.prior_precision,
        seed=config.seed,
    )
    training = data.Batches(
        images.train_x,
        images.train_y,
        teacher.train_logits,
        batch_size=settings.batch_size,
        shuffle_seed=config.seed + 2,
    )
    testing = data.Batches(images.test_x, images.test_y, batch_size=train.EVALUATION_BATCH)
    posterior = bkd.PosteriorPredictive(
        num_rows=len(images.test_y),
        num_classes=images.num_classes,
        labels=images.test_y,
        diagnostics=True,
        num_draws=settings.num_draws if settings.num_draws > 1 else None,
    )
    draws = bkd.Draws(kept, model, keep=config.posterior.keep)
    begin = time.perf_counter()
    predictive_seconds = 0.0
    for draw in bkd.sample(
        model,
        sampler,
        loss,
        training,
        warm_start=settings.warm_start,
        burn_in=settings.burn_in,
        thin=settings.thin,
        num_draws=settings.num_draws,
        progress=console.is_terminal,
        callbacks=(chain,),
    ):
        drawn = time.perf_counter()
        posterior.update(draw, testing)
        draws.add(draw)
        predictive_seconds += time.perf_counter() - drawn
    draws.write_card(
        data_hash=bkd.data_hash(images.train_x, images.train_y),
        sampler=sampler,
        health={"noise_share": chain.noise_share, "stationarity": chain.stationarity},
        notes={"data": images.name, "title": config.title},
    )
    drawn = time.perf_counter()
    posterior.flush()
    end = time.perf_counter()
    predictive_seconds += end - drawn
    return posterior, end - begin - predictive_seconds, predictive_seconds


def coverage(posterior: bkd.PosteriorPredictive, labels: Tensor, levels: list[float]) -> list[Coverage]:
    """Both readings of the deviance intervals' coverage at each level."""
    own = torch.stack(
        [
            posterior.quantile((j + 0.5) / COVERAGE_QUANTILES).gather(1, labels[:, None])[:, 0]
            for j in range(COVERAGE_QUANTILES)
        ]
    )
    found = []
    for level in levels:
        upper = posterior.deviance_upper(level)
        plug_in = deviance_coverage(posterior.mean, labels, upper)
        found.append(Coverage(level, plug_in, averaged_deviance_coverage(own, upper)))
    return found


def _epochs(log: Log, who: str) -> Callable[[int, float], None]:
    return lambda epoch, loss: log.write("epoch", model=who, epoch=epoch, loss=loss)


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
