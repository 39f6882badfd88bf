"""Everything that a run found out, in one place: what metrics.json, the figures and the report are drawn from."""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

from torch import Tensor

from bkd_fast.app.config import Config
from bkd_fast.app.data import Images
from bkd_fast.app.log import ChainLog, measured
from bkd_fast.app.scale.config import ScaleConfig
from bkd_fast.app.scale.images import Pictures
from bkd_fast.app.scores import Difference, Prediction, Scores, compare, score
from bkd_fast.posterior import Diagnostics


@dataclass(frozen=True)
class Trace:
    """Mean energies of stretches of steps (nats per image), and the chain's two figures of health, one per group.

    taken, drawn: steps and draws, those of an interrupted run before not included.
    """

    steps: list[int]
    phases: list[str]
    energies: list[float]
    noise_share: list[float]
    stationarity: list[float]
    taken: int
    drawn: int

    @classmethod
    def of(cls, log: ChainLog) -> Self:
        """What the log has gathered."""
        return cls(log.steps, log.phases, log.energies, log.noise_share, log.stationarity, log.taken, log.drawn)


@dataclass(frozen=True)
class Coverage:
    """How often the deviance intervals of a nominal level contain the label's deviance.

    plug_in: of the mean probability; averaged: of the draws, mean over them.
    """

    level: float
    plug_in: float
    averaged: float


@dataclass(frozen=True)
class Convergence:
    """Whether the chain's halves agree on the probabilities of labels and of top classes, and what its draws are worth there.

    rhat: median rank-normalised split R-hat (None: too few draws); unconverged: the share of cells above `limit`.
    ess: median effective draws of the mean (None: too few draws).
    """

    rhat: float | None
    unconverged: float | None
    limit: float
    ess: float | None

    @classmethod
    def of(cls, diagnostics: Diagnostics) -> Self:
        """From the posterior's own diagnostics."""

        def known(value: float) -> float | None:
            return None if math.isnan(value) else value

        medians = [known(float(figures.nanmedian())) for figures in (diagnostics.rhat, diagnostics.ess)]
        return cls(medians[0], known(diagnostics.unconverged), diagnostics.limit, medians[1])


@dataclass(frozen=True)
class Timings:
    """Seconds of wall-clock time by part of the run; teacher is 0 where it came from the cache.

    features: recording what is below a part that is sampled alone.
    """

    teacher: float
    student: float
    sampling: float
    predictive: float
    total: float
    features: float = 0.0


@dataclass(frozen=True)
class Results:
    """One run.

    teacher, kd, bkd: the three predictions for the test images.
    lower, upper: (N, C) ends of the credible intervals of the class probabilities at `config.posterior.level`.
    convergence: of the chain, in function space.
    mutual_information: (N,) nats, the part of BKD's predictive entropy that comes from the parameters.
    coverage: of the deviance intervals, by increasing level; `config.posterior.level` is one of them.
    machine: what it ran on: versions, threads, instruction set.
    """

    config: Config | ScaleConfig
    images: Images | Pictures
    architectures: dict[str, str]
    teacher: Prediction
    kd: Prediction
    bkd: Prediction
    lower: Tensor
    upper: Tensor
    mutual_information: Tensor
    convergence: Convergence
    coverage: list[Coverage]
    trace: Trace
    timings: Timings
    teacher_reused: bool
    machine: dict[str, str]

    @property
    def predictions(self) -> tuple[Prediction, Prediction, Prediction]:
        return self.teacher, self.kd, self.bkd

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """The table, by the predictions' keys."""
        return {prediction.key: score(prediction, self.images.test_y) for prediction in self.predictions}

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """BKD minus KD, the same network with and without its posterior."""
        return compare(self.bkd, self.kd, self.images.test_y)

    @property
    def covered(self) -> Coverage:
        """At the configured level."""
        return next(coverage for coverage in self.coverage if coverage.level == self.config.posterior.level)

    @property
    def sampling_steps(self) -> int:
        chain = self.config.sampling
        return chain.warm_start + chain.burn_in + chain.thin * chain.num_draws

    @property
    def draws(self) -> int:
        """Of all chains."""
        sampling = self.config.sampling
        if isinstance(self.config, Config):
            return sampling.num_draws
        return sampling.num_draws * self.config.sampling.chains * self.config.processes.chains

    @property
    def throughput(self) -> dict[str, float]:
        """Steps and training images per second; predictive cells (image x class) per second and draw."""
        batch = min(self.config.sampling.batch_size, len(self.images.train_y))
        steps = _rate(self.trace.taken, self.timings.sampling)
        return {
            "steps_per_second": steps,
            "training_images_per_second": steps * batch,
            "predictive_cells_per_second": _rate(self.bkd.probs.numel() * self.trace.drawn, self.timings.predictive),
        }

    def as_dict(self) -> dict[str, Any]:
        """metrics.json: plain numbers, with the configuration that gave them."""
        interval = self.upper - self.lower
        return {
            "title": self.config.title,
            "data": {
                "name": self.images.name,
                "train_images": len(self.images.train_y),
                "test_images": len(self.images.test_y),
                "classes": self.images.num_classes,
            },
            "models": {
                prediction.key: {
                    "architecture": self.architectures[prediction.key],
                    "parameters": prediction.parameters,
                    "uncertainty": prediction.score,
                    **asdict(self.scores[prediction.key]),
                }
                for prediction in self.predictions
            },
            "bkd_minus_kd": {name: asdict(difference) for name, difference in self.differences.items()},
            "intervals": {
                "level": self.config.posterior.level,
                "mean_length": float(interval.mean()),
                "mean_length_top_class": float(interval.gather(1, self.bkd.probs.argmax(1, keepdim=True)).mean()),
            },
            "deviance_coverage": [asdict(coverage) for coverage in self.coverage],
            "mean_mutual_information": float(self.mutual_information.mean()),
            "convergence": asdict(self.convergence),
            "health": {
                "noise_share": measured(self.trace.noise_share),
                "stationarity": measured(self.trace.stationarity),
            },
            "seconds": asdict(self.timings),
            "throughput": self.throughput,
            "teacher_reused": self.teacher_reused,
            "machine": self.machine,
            "config": self.config.model_dump(mode="json"),
        }


def _rate(count: int, seconds: float) -> float:
    """0 where nothing was left to do."""
    return count / seconds if count else 0.0
