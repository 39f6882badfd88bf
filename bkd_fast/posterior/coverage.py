"""Whether credible intervals hold what their level promises: intervals of the deviance, and of class probabilities."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bkd_fast.posterior.inputs import check_classes, check_level, check_predictions, check_probabilities

NAMED_ROWS = 5  # of those without an interval, in the error


@dataclass(frozen=True)
class CellCoverage:
    """The covered fraction of cells (row, class).

    cells: over all N x C cells.
    per_class: (C,) float64, over the N rows for each class.
    top: over one cell in each row, the predicted class's.
    """

    cells: float
    per_class: Tensor
    top: float

    @classmethod
    def of(cls, covered: Tensor, top: Tensor) -> Self:
        """The means of covered (N, C), in [0, 1], with `top` (N,) the predicted classes."""
        covered = covered.double()
        chosen = covered.gather(1, top[:, None].long())
        return cls(float(covered.mean()), covered.mean(dim=0), float(chosen.mean()))


@dataclass(frozen=True)
class IntervalCoverage:
    """Credible intervals against the truth.

    level: what they promise.
    coverage: the fraction that hold the truth, ends included.
    length: mean upper - lower.
    score: mean interval score, lower is better (see `interval_coverage`).
    """

    level: float
    coverage: CellCoverage
    length: float
    score: float


def deviance_coverage(mean: Tensor, labels: Tensor, upper: Tensor) -> float:
    """The fraction of labels whose deviance under the predictive lies in its credible interval [0, U].

    `mean_i 1[-2 log qbar_{i, y_i} <= U_i]`, the plug-in reading of Fang et al. (ICML 2024). Meant for high levels: at a
    level below the top class's probability, U is a quantile of that class's own deviances, which the mean's may exceed.

    Args:
        mean: (N, C) posterior mean of the class probabilities, qbar.
        labels: (N,) integers in [0, C).
        upper: (N,) upper ends U, from `PosteriorPredictive.deviance_upper(level)`.

    Raises:
        ValueError: shapes disagree, there is no row, a row of `mean` is no probability vector, a label is out of range, or an
            upper end is NaN.
    """
    check_predictions(mean, labels)
    if upper.shape != labels.shape:
        raise ValueError(f"upper has shape {tuple(upper.shape)}: must be {tuple(labels.shape)}, one value per row")
    _check_ends(upper)
    deviance = -2 * mean.double().gather(1, labels[:, None].long())[:, 0].log()
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
        ValueError: shapes disagree, there is no row or no quantile, or a quantile or an upper end is NaN.
    """
    if label_quantiles.ndim != 2 or upper.shape != label_quantiles.shape[1:] or label_quantiles.numel() == 0:
        raise ValueError(
            f"label_quantiles have shape {tuple(label_quantiles.shape)} and upper {tuple(upper.shape)}: "
            "must be (Q, N) and (N,) with Q, N >= 1"
        )
    _check_ends(label_quantiles.T, upper[:, None])
    weight = label_quantiles.double()
    inside = -2 * weight.log() <= upper.double()
    # a label that every draw excludes is covered by an infinite interval only
    share = torch.where(weight.sum(0) > 0, (weight * inside).sum(0) / weight.sum(0), inside.double().mean(0))
    return float(share.mean())


def interval_coverage(lower: Tensor, upper: Tensor, truth: Tensor, level: float, top: Tensor) -> IntervalCoverage:
    """Coverage, length and interval score of credible intervals of class probabilities whose true values are known.

    The interval score of [l, u] at level 1 - a is `(u - l) + (2 / a) max(l - p, 0) + (2 / a) max(p - u, 0)` (Winkler, JASA 1972;
    Gneiting and Raftery, JASA 2007, equation 43): proper for the central interval, so that neither vague nor overconfident
    intervals win.

    Args:
        lower, upper: (N, C), from `PosteriorPredictive.interval(level)`.
        truth: (N, C) the true probabilities.
        level: of the intervals, in (0, 1).
        top: (N,) the predicted class of each row, `PosteriorPredictive.mean.argmax(1)`. It must not be chosen by the truth:
            the class whose true probability is largest is covered less often than the level, by an exact posterior too.

    Raises:
        ValueError: shapes disagree, there is no row, a row of `truth` is no probability vector, an interval is NaN (the
            message names its row: one without draws) or has lower > upper, a class is out of range, or the level.
    """
    check_level(level)
    check_probabilities(truth)
    if lower.shape != truth.shape or upper.shape != truth.shape:
        raise ValueError(
            f"lower has shape {tuple(lower.shape)} and upper {tuple(upper.shape)}: must be {tuple(truth.shape)}, as the truth"
        )
    check_classes("top", top, truth)
    _check_ends(lower, upper)
    lower, upper, truth = lower.double(), upper.double(), truth.double()
    if bool((lower > upper).any()):
        row, column = (lower > upper).nonzero()[0].tolist()
        raise ValueError(
            f"row {row}, class {column}: lower = {float(lower[row, column]):.6g} > upper = {float(upper[row, column]):.6g}"
        )
    outside = (lower - truth).clamp_min(0) + (truth - upper).clamp_min(0)
    length = float((upper - lower).mean())
    return IntervalCoverage(
        level=level,
        coverage=CellCoverage.of((lower <= truth) & (truth <= upper), top),
        length=length,
        score=length + 2 / (1 - level) * float(outside.mean()),
    )


def _check_ends(*ends: Tensor) -> None:
    """Refuse NaN in ends, each (N, ...)."""
    bad = torch.stack([end.isnan().reshape(len(end), -1).any(dim=1) for end in ends]).any(dim=0)
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
        raise ValueError(
            f"the intervals of rows {', '.join(map(str, rows[:NAMED_ROWS]))}{more} are NaN, as without draws: leave them out"
        )
