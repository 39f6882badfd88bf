"""What a predictive distribution is worth: the table of scores, and paired differences with their standard errors."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torch import Tensor

from bkd_fast.posterior.metrics import ReliabilityBins, RiskCoverage, reliability_bins, risk_coverage
from bkd_fast.posterior.predictive import PosteriorPredictive


@dataclass(frozen=True)
class Prediction:
    """What one model says about the test images.

    key: teacher, kd or bkd; name: for people.
    probs: (N, C) class probabilities, float64.
    uncertainty: (N,) larger is less certain; score: what it is called.
    parameters: numbers trained or sampled.
    """

    key: str
    name: str
    probs: Tensor
    uncertainty: Tensor
    score: str
    parameters: int

    @classmethod
    def from_logits(cls, key: str, name: str, logits: Tensor, parameters: int) -> Self:
        """A point estimate: softmax probabilities, ranked by their entropy (nats)."""
        log_probs = logits.double().log_softmax(dim=1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=1)
        return cls(key, name, log_probs.exp(), entropy, "entropy", parameters)

    @classmethod
    def from_posterior(cls, key: str, name: str, posterior: PosteriorPredictive, parameters: int) -> Self:
        """The posterior predictive: mean probabilities, ranked by their mean deviance (twice the expected entropy)."""
        mean = posterior.mean.double()
        # float32 means sum to 1 within rounding only
        probs = mean / mean.sum(dim=1, keepdim=True)
        return cls(key, name, probs, posterior.mean_deviance.double(), "mean deviance", parameters)


@dataclass(frozen=True)
class Scores:
    """One row of the table.

    accuracy: fraction of right top classes.
    nll: mean negative log likelihood of the labels, in nats.
    brier: mean squared distance to the one-hot label, in [0, 2].
    ece: expected calibration error over 15 equal-width bins, in [0, 1].
    error_auroc: probability that a wrong prediction has the larger uncertainty than a right one (None: no or only
        errors).
    aurc: area under the risk-coverage curve, in [0, 1].
    """

    accuracy: float
    nll: float
    brier: float
    ece: float
    error_auroc: float | None
    aurc: float


@dataclass(frozen=True)
class Difference:
    """A paired difference over the test images, and the standard error that the choice of those images gives it."""

    mean: float
    standard_error: float

    @property
    def verdict(self) -> str:
        """Whether zero lies outside mean +- 2 standard errors."""
        if abs(self.mean) <= 2 * self.standard_error:
            return "no clear difference"
        return "higher" if self.mean > 0 else "lower"


def errors(prediction: Prediction, labels: Tensor) -> Tensor:
    """(N,) float64, 1 where the top class is wrong."""
    return (prediction.probs.argmax(dim=1) != labels).double()


def reliability(prediction: Prediction, labels: Tensor) -> ReliabilityBins:
    """The prediction's bins of confidence."""
    return reliability_bins(prediction.probs, labels)


def selective(prediction: Prediction, labels: Tensor) -> RiskCoverage:
    """The prediction's risk-coverage curve by its own uncertainty."""
    return risk_coverage(prediction.uncertainty, errors(prediction, labels))


def score(prediction: Prediction, labels: Tensor) -> Scores:
    """Every figure of the table for labels (N,)."""
    wrong = errors(prediction, labels)
    probs, truth = prediction.probs.numpy(), labels.numpy()
    classes = np.arange(probs.shape[1])
    both = 0 < float(wrong.sum()) < len(wrong)
    return Scores(
        accuracy=1 - float(wrong.mean()),
        nll=float(log_loss(truth, probs, labels=classes)),
        brier=float(brier_score_loss(truth, probs, labels=classes, scale_by_half=False)),
        ece=reliability(prediction, labels).expected_calibration_error,
        error_auroc=float(roc_auc_score(wrong.numpy(), prediction.uncertainty.numpy())) if both else None,
        aurc=selective(prediction, labels).area,
    )


def compare(first: Prediction, second: Prediction, labels: Tensor) -> dict[str, Difference]:
    """Accuracy, NLL and Brier score of `first` minus those of `second`, image by image."""

    def per_image(prediction: Prediction) -> dict[str, Tensor]:
        own = prediction.probs.gather(1, labels[:, None])[:, 0]
        squares = (prediction.probs - torch.nn.functional.one_hot(labels, prediction.probs.shape[1])).square()
        return {"accuracy": 1 - errors(prediction, labels), "nll": -own.log(), "brier": squares.sum(dim=1)}

    ours, theirs = per_image(first), per_image(second)
    gaps = {name: ours[name] - theirs[name] for name in ours}
    return {name: Difference(float(gap.mean()), float(gap.std()) / len(gap) ** 0.5) for name, gap in gaps.items()}
