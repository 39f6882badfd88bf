"""Whether what is said with probability p happens with frequency p: reliability bins and calibration errors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bkd_fast.posterior.inputs import check_predictions


@dataclass(frozen=True)
class ReliabilityBins:
    """Bins of confidence; entries of empty bins are NaN in `confidence` and `accuracy`.

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


def reliability_bins(probs: Tensor, labels: Tensor, bins: int = 15, *, adaptive: bool = False) -> ReliabilityBins:
    """Accuracy against confidence of the top class (Guo et al., ICML 2017, equation 3).

    Args:
        probs: (N, C), rows are probability vectors.
        labels: (N,) integers in [0, C).
        bins: how many bins share [0, 1].
        adaptive: bins of equal mass instead of equal width (Nguyen and O'Connor, EMNLP 2015). Inner edge k is the
            confidence of rank ceil(k N / bins), so all rows of one confidence are in one bin; a confidence that fills several
            shares leaves fewer bins, none of them empty.

    Raises:
        ValueError: shapes disagree, there is no row, a row is no probability vector, a label is out of range, or
            `bins` is not positive.
    """
    _check(probs, labels, bins)
    top, predicted = probs.double().max(dim=1)
    return _binned(top, predicted == labels, bins, adaptive)


def classwise_calibration_error(probs: Tensor, labels: Tensor, bins: int = 15, *, adaptive: bool = False) -> float:
    """Calibration of every class's probability, not of the top class only, in [0, 1].

    Each class c has its own bins of p_c, over all N rows, and its own count-weighted mean of |frequency of c - mean p_c|; the
    result is the mean over classes. With bins of equal width that is the static calibration error, with `adaptive` the
    adaptive one (SCE and ACE of Nixon et al., CVPR workshops 2019), without their threshold on small probabilities.

    A p_c of exactly 0 is in the first bin and one of exactly 1 in the last. Among adaptive bins, zeros that fill a bin's
    share have a bin of their own.

    Args, Raises: as `reliability_bins`.
    """
    _check(probs, labels, bins)
    errors = [
        _binned(column, labels == c, bins, adaptive).expected_calibration_error
        for c, column in enumerate(probs.double().T.contiguous())
    ]
    return sum(errors) / len(errors)


def _check(probs: Tensor, labels: Tensor, bins: int) -> None:
    check_predictions(probs, labels)
    if bins < 1:
        raise ValueError(f"bins = {bins}: must be at least 1")


def _binned(confidence: Tensor, happened: Tensor, bins: int, adaptive: bool) -> ReliabilityBins:
    edges = torch.arange(bins + 1, dtype=torch.float64, device=confidence.device) / bins
    if adaptive:
        ordered = confidence.sort().values
        ranks = (torch.arange(1, bins, device=confidence.device) * len(ordered) + bins - 1) // bins
        inner = torch.unique(ordered[ranks - 1])
        # beyond an edge at the largest confidence there is nothing
        edges = torch.cat([edges[:1], inner[inner < ordered[-1].clamp(max=1)], edges[-1:]])
    # right-closed bins: a confidence of exactly 1 belongs to the last, and rounding above 1 does not leave it
    place = torch.bucketize(confidence, edges[1:-1])
    count = torch.bincount(place, minlength=len(edges) - 1)
    mean_confidence = torch.bincount(place, weights=confidence, minlength=len(count)) / count
    accuracy = torch.bincount(place, weights=happened.double(), minlength=len(count)) / count
    return ReliabilityBins(edges, count, mean_confidence, accuracy)
