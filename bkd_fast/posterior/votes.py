"""Predictive distributions against votes: a sample of the truth, such as 50 people's labels of each image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bkd_fast.posterior.coverage import CellCoverage
from bkd_fast.posterior.inputs import check_classes, check_level, check_probabilities


@dataclass(frozen=True)
class VotePIT:
    """Where each observed count lies in its posterior predictive distribution (the probability integral transform).

    below: (N, C) float64, the posterior predictive probability of fewer votes than observed.
    upto: (N, C) float64, of as many or fewer.
    """

    below: Tensor
    upto: Tensor

    @property
    def mid(self) -> Tensor:
        """(N, C): the mid-p value, halfway from `below` to `upto`; on average 1/2 when votes follow the posterior."""
        return (self.below + self.upto) / 2

    def coverage(self, level: float, top: Tensor) -> CellCoverage:
        """The fraction of counts in the central interval of their predictive distributions: `level` if votes follow those.

        Counts are discrete: no interval of theirs has just this probability. The randomised transform, uniform between `below`
        and `upto`, is uniform over [0, 1] when votes follow the posterior predictive. A cell counts by the probability that
        it lies in [(1 - level) / 2, (1 + level) / 2], its expectation over the randomisation, so nothing is drawn (the
        nonrandomised transform of Czado, Gneiting and Held, Biometrics 2009). A count that was certain counts `level`: cells
        of classes that nobody votes for pull towards it, so look at `top` and `per_class` too.

        Args:
            level: in (0, 1).
            top: (N,) the predicted class of each row, not the one with most votes (see `interval_coverage`).

        Raises:
            ValueError: the level or a class is out of range.
        """
        check_level(level)
        check_classes("top", top, self.below)
        low, high = (1 - level) / 2, (1 + level) / 2
        width = self.upto - self.below
        overlap = (self.upto.clamp(max=high) - self.below.clamp(min=low)).clamp_min(0)
        # a count that the posterior excludes has a transform of no width, a point
        point = (low <= self.below) & (self.below <= high)
        return CellCoverage.of(torch.where(width > 0, overlap / width, point.double()), top)


@dataclass(frozen=True)
class VoteDivergence:
    """Predicted probabilities p against the distribution v of the votes, row by row, in nats; each (N,) float64.

    entropy: H(v).
    cross_entropy: -sum_c v_c log p_c, what soft labels are scored by; its mean is the negative log likelihood of a vote.
    kl: KL(v || p) = cross_entropy - entropy, at least 0.
    """

    entropy: Tensor
    cross_entropy: Tensor
    kl: Tensor


def vote_frequencies(counts: Tensor) -> Tensor:
    """The observed frequencies (N, C) float64 of counts (N, C).

    As the truth of `interval_coverage` they give a naive reading only: a frequency is the true probability and the noise of
    some n votes, so intervals cover it less often than they should, by an exact posterior too; a class without a vote
    lies outside every interval that excludes 0. `vote_pit` is the calibrated reading.

    Raises:
        ValueError: counts are not (N, C) with N >= 1, or hold a negative or broken number or a row without votes.
    """
    _check_counts(counts)
    return counts.double() / counts.double().sum(dim=1, keepdim=True)


def vote_pit(quantiles: Tensor, counts: Tensor) -> VotePIT:
    """The posterior predictive distribution of each class's count, at the observed count. Needs SciPy.

    Given p_ic, class c's count among the n_i votes for row i is Binomial(n_i, p_ic). Over the posterior that is a mixture, here
    the mean of Q binomials, one for each quantile: nothing is drawn, and the only error is that Q points of equal
    weight stand for the posterior.

    Args:
        quantiles: (Q, N, C) posterior quantiles of the class probabilities at the levels (j + 1/2) / Q,
            `PosteriorPredictive.quantile`; or Q draws of them.
        counts: (N, C) votes, whole numbers of any dtype.

    Raises:
        ValueError: shapes disagree, there is no quantile, a quantile is NaN or outside [0, 1], or as `vote_frequencies`.
    """
    _check_counts(counts)
    if quantiles.ndim != 3 or quantiles.shape[1:] != counts.shape or len(quantiles) == 0:
        raise ValueError(
            f"quantiles have shape {tuple(quantiles.shape)} and counts {tuple(counts.shape)}: "
            "must be (Q, N, C) and (N, C) with Q >= 1"
        )
    bad = ~((quantiles >= 0) & (quantiles <= 1)).all(dim=0)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"quantiles of row {row}, class {column}: must be in [0, 1]; they are NaN in rows without draws"
        )
    from scipy.stats import binom

    votes = counts.double().cpu()
    total = votes.sum(dim=1, keepdim=True).numpy()
    below, at = torch.zeros_like(votes), torch.zeros_like(votes)
    for points in quantiles:
        p = points.double().cpu().numpy()
        below += torch.from_numpy(binom.cdf(votes.numpy() - 1, total, p))
        at += torch.from_numpy(binom.pmf(votes.numpy(), total, p))
    below, at = below.to(quantiles.device) / len(quantiles), at.to(quantiles.device) / len(quantiles)
    return VotePIT(below, below + at)


def vote_divergence(probs: Tensor, counts: Tensor, pseudo_count: float = 0.0) -> VoteDivergence:
    """Cross-entropy and Kullback-Leibler divergence of predicted probabilities from the votes' distribution.

    That distribution is `v_c = (counts_c + pseudo_count) / (n + C pseudo_count)`. 0, the convention of soft labels (Peterson
    et al., ICCV 2019), takes the frequencies; the divergence of a perfect prediction is then not 0 but about
    (classes in use - 1) / (2 n). 1/2 is the mean under Jeffreys' prior. Cross-entropy and divergence are infinite where p_c = 0
    and v_c > 0.

    Args:
        probs: (N, C) predicted probabilities; rows are divided by their sums.
        counts: (N, C) votes, whole numbers of any dtype.
        pseudo_count: votes that each class is given, at least 0.

    Raises:
        ValueError: shapes disagree, a row of `probs` is no probability vector, `pseudo_count` is negative or not finite, or as
            `vote_frequencies`.
    """
    check_probabilities(probs)
    _check_counts(counts)
    if probs.shape != counts.shape:
        raise ValueError(
            f"probabilities have shape {tuple(probs.shape)} and counts {tuple(counts.shape)}: must be equal"
        )
    if not 0 <= pseudo_count < float("inf"):
        raise ValueError(f"pseudo_count = {pseudo_count!r}: must be finite and at least 0")
    votes = counts.double() + pseudo_count
    v = votes / votes.sum(dim=1, keepdim=True)
    p = probs.double() / probs.double().sum(dim=1, keepdim=True)
    entropy = torch.special.entr(v).sum(dim=1)
    cross_entropy = -torch.xlogy(v, p).sum(dim=1)
    return VoteDivergence(entropy, cross_entropy, (cross_entropy - entropy).clamp_min(0))


def _check_counts(counts: Tensor) -> None:
    if counts.ndim != 2 or len(counts) == 0:
        raise ValueError(f"counts have shape {tuple(counts.shape)}: must be (N, C) with N >= 1")
    # comparisons that NaN fails
    bad = ~((counts >= 0) & (counts < float("inf")) & (counts == counts.round())).all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"counts in row {row} are {counts[row].tolist()}: must be whole numbers, at least 0")
    empty = counts.double().sum(dim=1) == 0
    if empty.any():
        raise ValueError(f"counts in row {int(empty.nonzero()[0])}: there are no votes; leave such rows out")
