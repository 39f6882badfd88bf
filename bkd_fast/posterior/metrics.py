"""Scores of predictive distributions that no library has right: calibration bins, risk-coverage, interval coverage.

Log loss, the Brier score and AUROC are scikit-learn's; nothing here repeats them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReliabilityBins:
    """Equal-width bins of confidence; entries of empty bins are NaN in `confidence` and `accuracy`.

    edges: (B + 1,) from 0 to 1; bin b holds confidences in (edges[b], edges[b + 1]], the first one 0 as well.
    count: (B,) int64, predictions per bin.
    confidence, accuracy: (B,) float64, means over the bin.
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def expected_calibration_error(self) -> float:
        """Count-weighted mean of |accuracy - confidence|, in [0, 1]."""
        filled = self.count > 0
        gap = (self.accuracy - self.confidence).abs()[filled]
        return float((gap * self.count[filled]).sum() / self.count.sum())


@dataclass(frozen=True)
class RiskCoverage:
    """The error rate among the predictions that remain when the most uncertain ones are refused.

    coverage: (N,) float64, k / N for k = 1..N kept predictions.
    risk: (N,) float64, error rate among the k most certain; tied scores count by their expectation over random order.
    """

    coverage: Tensor
    risk: Tensor

    @property
    def area(self) -> float:
        """AURC, the mean risk over all coverages (Geifman, Uziel and El-Yaniv, ICLR 2019); lower is better."""
        return float(self.risk.mean())


def reliability_bins(probs: Tensor, labels: Tensor, bins: int = 15) -> ReliabilityBins:
    """Accuracy against confidence of the top class in equal-width bins (Guo et al., ICML 2017, equation 3).

    Args:
        probs: (N, C), rows are probability vectors.
        labels: (N,) integers in [0, C).
        bins: how many bins share [0, 1].

    Raises:
        ValueError: shapes disagree, there is no row, a row is no probability vector, a label is out of range, or
            `bins` is not positive.
    """
    _check_predictions(probs, labels)
    if bins < 1:
        raise ValueError(f"bins = {bins}: must be at least 1")
    top, predicted = probs.double().max(dim=1)
    correct = (predicted == labels).double()
    edges = torch.arange(bins + 1, dtype=torch.float64, device=probs.device) / bins
    # right-closed bins: a confidence of exactly 1 belongs to the last, and rounding above 1 does not leave it
    place = torch.bucketize(top, edges[1:-1])
    count = torch.bincount(place, minlength=bins)
    mean_confidence = torch.bincount(place, weights=top, minlength=bins) / count
    mean_accuracy = torch.bincount(place, weights=correct, minlength=bins) / count
    return ReliabilityBins(edges, count, mean_confidence, mean_accuracy)


def risk_coverage(score: Tensor, error: Tensor) -> RiskCoverage:
    """Selective prediction by any score of uncertainty.

    Args:
        score: (N,), larger is less certain (mean deviance, entropy, 1 - confidence).
        error: (N,), the loss of each prediction; 1 for wrong and 0 for right makes the risk an error rate.

    Raises:
        ValueError: shapes disagree, there is no prediction, or a score is NaN.
    """
    if score.ndim != 1 or score.shape != error.shape or len(score) == 0:
        raise ValueError(
            f"score has shape {tuple(score.shape)} and error {tuple(error.shape)}: both must be (N,) with N >= 1"
        )
    if torch.isnan(score).any():
        raise ValueError(f"score: {int(torch.isnan(score).sum())} of {len(score)} values are NaN, which have no rank")
    _, group, size = torch.unique(score, return_inverse=True, return_counts=True)
    mean_error = torch.bincount(group, weights=error.double()) / size
    kept = torch.arange(1, len(score) + 1, dtype=torch.float64, device=score.device)
    risk = torch.repeat_interleave(mean_error, size).cumsum(0) / kept
    return RiskCoverage(kept / len(score), risk)


def deviance_coverage(mean: Tensor, labels: Tensor, upper: Tensor) -> float:
    """The fraction of labels whose deviance under the predictive lies in its credible interval [0, U].

    `mean_i 1[-2 log qbar_{i, y_i} <= U_i]`, the plug-in reading of Fang et al. (ICML 2024). Meant for high levels: at a
    level below the top class's probability, U is a quantile of that class's own deviances, which the mean's may exceed.

    Args:
        mean: (N, C) posterior mean of the class probabilities, qbar.
        labels: (N,) integers in [0, C).
        upper: (N,) upper ends U, from `PosteriorPredictive.deviance_upper(level)`.

    Raises:
        ValueError: shapes disagree, there is no row, a row of `mean` is no probability vector, or a label is out of
            range.
    """
    _check_predictions(mean, labels)
    if upper.shape != labels.shape:
        raise ValueError(f"upper has shape {tuple(upper.shape)}: must be {tuple(labels.shape)}, one value per row")
    deviance = -2 * mean.double().gather(1, labels[:, None])[:, 0].log()
    return float((deviance <= upper.double()).double().mean())


def averaged_deviance_coverage(label_quantiles: Tensor, upper: Tensor) -> float:
    """The posterior probability, mean over rows, that a label's deviance lies in its credible interval [0, U].

    `mean_i E_theta(q 1[-2 log q <= U_i]) / E_theta(q)` with q = q_{theta, i, y_i}: every draw counts by the probability
    that it gives the label, as in the weighted quantile U. It equals the level when labels follow the draws; without
    those weights it would fall short of it.

    Args:
        label_quantiles: (Q, N) quantiles of q_{i, y_i} at the levels (j + 1/2) / Q, which stand for the posterior; the
            result is exact to 1 / Q.
        upper: (N,) upper ends U, from `PosteriorPredictive.deviance_upper(level)`.

    Raises:
        ValueError: shapes disagree, or there is no row or no quantile.
    """
    if label_quantiles.ndim != 2 or upper.shape != label_quantiles.shape[1:] or label_quantiles.numel() == 0:
        raise ValueError(
            f"label_quantiles have shape {tuple(label_quantiles.shape)} and upper {tuple(upper.shape)}: "
            "must be (Q, N) and (N,) with Q, N >= 1"
        )
    weight = label_quantiles.double()
    inside = -2 * weight.log() <= upper.double()
    # a label that every draw excludes is covered by an infinite interval only
    share = torch.where(weight.sum(0) > 0, (weight * inside).sum(0) / weight.sum(0), inside.double().mean(0))
    return float(share.mean())


def _check_predictions(probs: Tensor, labels: Tensor) -> None:
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or len(probs) == 0:
        raise ValueError(
            f"probabilities have shape {tuple(probs.shape)} and labels {tuple(labels.shape)}: "
            "must be (N, C) and (N,) with N >= 1"
        )
    total = probs.double().sum(dim=1)
    bad = (probs < 0).any(dim=1) | ~torch.isclose(total, torch.ones_like(total), atol=1e-3)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"probabilities in row {row}: must be >= 0 and sum to 1; they sum to {float(total[row]):.6g}")
    if labels.is_floating_point() or bool((labels < 0).any()) or bool((labels >= probs.shape[1]).any()):
        raise ValueError(
            f"labels of {labels.dtype} in [{labels.min()}, {labels.max()}]: must be integers in [0, {probs.shape[1]})"
        )
